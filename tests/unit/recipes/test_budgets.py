"""Budgets and grids of a recipe: what an estimate is asked, and what is refused before training."""

import pytest
from peft import get_peft_model
from torch import nn

from rankbits import BayesianLoraConfig
from rankbits.accounting.budget import Budget, Quantity
from rankbits.accounting.spec import Granularity, Placement
from rankbits.errors import RecipeError
from rankbits.recipes.load import load
from rankbits.recipes.question import budgets_of, from_keys, from_recipe
from rankbits.recipes.trainer_parts import gate_schedule

LENGTH = "sequence_length=16"


def test_a_recipe_s_budgets_are_at_its_longest_rows():
    changes = ["gates.budget=[bops=0.25,rank=2]", "gates.reference_bits=32", "gates.scope=model", "task.max_length=48"]
    recipe = load("quickstart", changes)
    operations = Budget(Quantity.BOPS, 0.25, 32, 48, "model")
    assert budgets_of(recipe) == [operations, Budget(Quantity.RANK, 2.0, 32)]
    assert from_recipe(recipe).budget == operations
    assert from_recipe(recipe, "bits=4").budget == Budget(Quantity.BITS, 4.0, 32)


def test_where_grids_lie_is_asked_of_recipes_and_keys():
    grids = [
        "placement=merged",
        "granularity=group",
        "group_size=32",
        "scale_bits=16",
        "share_inputs=false",
        "tie_groups=fused",
    ]
    of_recipe = from_recipe(load("quickstart", [f"adapter.{grid}" for grid in grids])).spec
    of_keys = from_keys("minilm", [*grids, LENGTH]).spec
    for spec in (of_recipe, of_keys):
        assert spec.sites == ("weight", "input")
        assert (spec.placement, spec.granularity) == (Placement.MERGED, Granularity.GROUP)
        assert (spec.group_size, spec.scale_bits) == (32, 16)
        assert (spec.share_inputs, spec.tie_groups, spec.rounds_sum) == (False, True, True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["gates.budget=bits=1"], "gates: budget bits=1 cannot be met: with 2 bits and rank 1 everywhere it is 2"),
        (["gates.budget=bits=4", "gates.lambda_q=0.1"], "gates: lambda_q: given 0.1 together with the budget bits=4"),
        (["gates.budget=bops=0.5", "gates.scope=model"], "gates: budget bops=0.5 of the whole model cannot be counted"),
    ],
)
def test_a_budget_that_does_not_suit_the_model_is_an_error_of_the_recipe(changes, said):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), BayesianLoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(RecipeError, match=said):
        gate_schedule(load("quickstart", changes), model, 40)
