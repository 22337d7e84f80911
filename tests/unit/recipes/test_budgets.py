"""Budgets and grids of a recipe: what an estimate is asked, and what is refused before training."""

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import OmegaConf
from peft import get_peft_model
from torch import nn

from rankbits import BayesianLoraConfig
from rankbits.accounting.budget import Budget, Quantity
from rankbits.accounting.spec import Granularity, Placement
from rankbits.errors import RecipeError
from rankbits.recipes.budgets import budgets_of
from rankbits.recipes.load import load
from rankbits.recipes.question import from_keys, from_recipe
from rankbits.recipes.trainer_parts import gate_schedule
from rankbits.training.schedule import GateSchedule

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
        (["gates.budget=bytes=0.13"], "gates: budget bytes=0.13 cannot be met: with 2 bits and rank 1 everywhere"),
        (["gates.budget=rank=3"], "gates: budget rank=3 cannot be met: with 2 bits and rank 1 everywhere it is 1"),
        (["gates.budget=bops=0.5", "gates.scope=model"], "gates: budget bops=0.5 of the whole model cannot be counted"),
    ],
)
def test_a_budget_that_does_not_suit_the_model_is_an_error_of_the_recipe(changes, said):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), BayesianLoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(RecipeError, match=said):
        gate_schedule(load("quickstart", changes), model, 40)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ['gates.budget=["bits=4","bits=5"]'],
            "gates.budget: given ['bits=4', 'bits=5'], expected one of each quantity, not several of bits "
            '[override gates.budget=["bits=4","bits=5"]]',
        ),
        (
            ["gates.budget=rank=2", "adapter.learn_rank=false"],
            "gates.budget: given 'rank=2', expected no limit of rank with adapter.learn_rank=false: no rank could meet "
            "it [override gates.budget=rank=2]",
        ),
        (["gates.budget=rank=1", "adapter.r=1"], "expected no limit of rank with adapter.r=1: no rank could"),
        (
            ["gates.budget=[bits=4,rank=2]", "adapter.learn_bits=false"],
            "gates.budget: given ['bits=4', 'rank=2'], expected no limit of bits with adapter.learn_bits=false: no "
            "width could meet it",
        ),
        (["gates.budget=bops=0.5", "adapter.quantizers=[]"], "expected no limit of bops with adapter.quantizers=[]:"),
        (
            ["gates.budget=bits=1.9"],
            "gates.budget: given 'bits=1.9', expected bits of 2 to 32 [override gates.budget=bits=1.9]",
        ),
        (["gates.budget=[rank=2,bits=33]"], "gates.budget: given 'bits=33', expected bits of 2 to 32"),
        (["gates.budget=bits=1", "adapter.learn_bits=false"], "expected no limit of bits with adapter.learn_bits"),
        (["gates.budget=rank=2", "adapter.r=1"], "expected no limit of rank with adapter.r=1"),
        (
            ["gates.budget=bops=1.5", "gates.reference_bits=32", "adapter.placement=merged"],
            "gates.budget: given 'bops=1.5', expected bops of 0.00390625 to 1",
        ),
        (["gates.budget=rank=8.1", "adapter.r=8"], "gates.budget: given 'rank=8.1', expected rank of 1 to 8"),
        (["gates.budget=rank=0.9"], "gates.budget: given 'rank=0.9', expected rank of 1 to"),
        (["gates.budget=bytes=0.12"], "gates.budget: given 'bytes=0.12', expected bytes of at least 0.125"),
        (["gates.budget=bops=0.015"], "gates.budget: given 'bops=0.015', expected bops of at least 0.015625"),
        (
            ["gates.budget=bytes=0.06", "gates.reference_bits=32"],
            "gates.budget: given 'bytes=0.06', expected bytes of at least 0.0625",
        ),
        (
            ["gates.scope=model", "gates.budget=bits=4"],
            "gates.scope: given the text 'model', expected adapted with gates.budget='bits=4': only bops are counted "
            "of a whole model [override gates.scope=model]",
        ),
        (
            ["gates.allocation=evidence"],
            "gates.allocation: given the text 'evidence', expected null or descent without gates.budget, by which "
            "alone evidence can choose [override gates.allocation=evidence]",
        ),
    ],
)
def test_a_budget_that_no_model_could_meet_is_refused_when_it_is_read(problems_of, changes, said) -> None:
    (problem,) = problems_of(*changes)
    assert said in problem


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["gates.budget=bits=4", "gates.lambda_q=1"],
            "gates.lambda_q: given 1, expected null with gates.budget='bits=4', which presses the same gates "
            "[override gates.lambda_q=1]",
        ),
        (["gates.budget=bops=0.5", "gates.lambda_q=0"], "gates.lambda_q: given 0, expected null with"),
        (["gates.budget=bytes=0.5", "gates.allocation=descent", "gates.lambda_q=1"], "gates.lambda_q: given 1, expect"),
        (["gates.budget=rank=2", "gates.lambda_r=0"], "gates.lambda_r: given 0, expected null with"),
        (["gates.budget=bytes=0.5", "gates.lambda_r=0"], "gates.lambda_r: given 0, expected null with"),
        (
            ["gates.budget=bits=4", "gates.lambda_r=0.5"],
            "gates.lambda_r: given 0.5, expected 0 or null with gates.budget='bits=4', or gates.allocation=descent: by "
            "evidence all gates are chosen when the warm-up ends, before a penalty acts [override gates.lambda_r=0.5]",
        ),
        (
            ["gates.budget=bops=0.5", "adapter.placement=merged", "gates.lambda_r=1"],
            "gates.lambda_r: given 1, expected 0 or null with",
        ),
        (
            ["gates.budget=rank=2", "gates.allocation=evidence", "gates.lambda_q=1"],
            "gates.lambda_q: given 1, expected 0 or null with",
        ),
        (
            ["gates.budget=bits=4", "gates.weighting=byte"],
            "gates.weighting: given 'byte', expected const with gates.budget='bits=4', or gates.allocation=descent: by "
            "evidence all gates are chosen when the warm-up ends, before a penalty acts",
        ),
        (["gates.budget=bits=4", "gates.reduction=mean"], "gates.reduction: given 'mean', expected sum with"),
    ],
)
def test_a_penalty_that_a_budget_leaves_no_place_for_is_refused(problems_of, changes, said) -> None:
    (problem,) = problems_of(*changes)
    assert said in problem


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["gates.budget=bits=4", "gates.warmup=0"],
            "gates.warmup: given 0, expected above 0 with gates.budget='bits=4': what closing gates costs is measured "
            "in the second half of the warm-up [override gates.warmup=0]",
        ),
        (
            ["gates.budget=bits=4", "gates.warmup=0.25", "training.max_steps=4"],
            "gates.warmup: given 0.25 of training.max_steps=4, expected at least 2 steps with gates.budget='bits=4':",
        ),
        (
            ["gates.budget=rank=2", "gates.warmup=1", "gates.ramp=0", "gates.fixed=0"],
            "gates.warmup: given 1, expected below 1 with gates.budget='rank=2': gates close between the warm-up and "
            "the fixed phase",
        ),
        (["gates.budget=rank=2", "gates.fixed=1", "gates.warmup=0", "gates.ramp=0"], "gates.fixed: given 1, expected"),
        (
            ["gates.budget=rank=2", "gates.warmup=0.5", "gates.fixed=0.5", "gates.ramp=0", "training.max_steps=6"],
            "gates.fixed: given 0.5 after a warm-up of 0.5 of training.max_steps=6, expected at least a step between",
        ),
    ],
)
def test_a_budget_needs_steps_in_which_gates_are_chosen(problems_of, changes, said) -> None:
    (problem,) = problems_of(*changes)
    assert said in problem


@pytest.mark.parametrize(
    "changes",
    [
        ["gates.budget=[bits=4,bytes=0.3,bops=0.2,rank=3]"],
        ["gates.budget=rank=4", "adapter.learn_bits=false"],
        ["gates.budget=bits=4", "adapter.quantizers=[]", "adapter.quantize_head=true"],
        ["gates.budget=[bits=4,bops=0.2]", "gates.scope=model"],
        ["gates.scope=model"],
        ["gates.budget=bits=4", "gates.lambda_r=0"],
        ["gates.budget=bits=4", "gates.allocation=descent", "gates.lambda_r=1"],
        ["gates.budget=rank=2", "gates.lambda_q=1", "gates.warmup=0"],
        ["gates.budget=rank=2", "gates.lambda_q=1", "gates.weighting=byte"],
        ["gates.budget=bits=4", "gates.allocation=descent", "gates.reduction=mean"],
        ["gates.budget=[bits=2,rank=1]", "gates.allocation=descent"],
        ["gates.budget=[bits=32,rank=8]", "adapter.r=8"],
        ["gates.budget=[bytes=0.125,bops=0.015625]"],
        ["gates.budget=[bytes=9,bops=9]", "adapter.placement=separate"],
        ["gates.budget=bops=4", "adapter.placement=merged"],
        ["gates.budget=bops=0.5", "gates.allocation=descent", "adapter.learn_rank=false", "gates.lambda_r=1"],
        ["gates.budget=bits=4", "gates.warmup=0.5", "training.max_steps=4"],
        ["gates.budget=rank=2", "gates.warmup=0.5", "gates.fixed=0.5", "gates.ramp=0", "training.max_steps=5"],
        ["gates.lambda_q=1", "gates.warmup=0", "gates.allocation=descent"],
        ["method=lora", "gates.allocation=evidence", "gates.scope=model", "gates.warmup=0"],
    ],
)
def test_what_a_budget_can_stand_beside_is_accepted(changes: list[str]) -> None:
    load("quickstart", changes)


PENALTIES = [f"gates.lambda_{kind}={value}" for kind in "qr" for value in (0, 1)]
UNFELT = [["gates.weighting=bop"], ["gates.reduction=mean"]]
LIMITS = ("bits=1.9", "bits=33", "bops=0.015", "rank=0.9", "rank=3")
PHASES = [
    ["gates.warmup=0"],
    ["gates.warmup=1", "gates.ramp=0", "gates.fixed=0"],
    ["gates.warmup=0", "gates.ramp=0", "gates.fixed=1"],
    ["gates.warmup=0.5", "gates.ramp=0", "gates.fixed=0.5"],
]
ASKED = [
    [f"gates.budget={budget}", *allocation, *more]
    for budget in ("bits=4", "bytes=0.5", "bops=1", "rank=1.5", "[bits=8,rank=1.5]", "[bits=4,bits=8]")
    for allocation in ([], ["gates.allocation=evidence"], ["gates.allocation=descent"])
    for more in ([], *([penalty] for penalty in PENALTIES), *UNFELT, *PHASES)
] + [[f"gates.budget={budget}"] for budget in LIMITS]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("placement", ["separate", "merged"])
def test_exactly_what_training_refuses_of_a_budget_is_refused_when_it_is_read(placement: str) -> None:
    always = [f"adapter.placement={placement}", "adapter.r=2", "training.max_steps=6"]
    # What factors beside the weight add to the operations is not known before the model is.
    of_operations = [["gates.budget=bops=4.01"]] if placement == "merged" else []
    for changes in ASKED + of_operations:
        refused = _is_refused(load, "quickstart", [*changes, *always])
        assert refused == _is_refused(_schedule, changes, placement), changes


def _schedule(changes: list[str], placement: str) -> GateSchedule:
    """What training makes of settings of gates that nobody has checked."""
    given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(changes))
    recipe = load("quickstart")
    unchecked = recipe.model_copy(update={"gates": recipe.gates.model_copy(update=given["gates"])})
    config = BayesianLoraConfig(r=2, target_modules=["0"], placement=placement)
    return gate_schedule(unchecked, get_peft_model(nn.Sequential(nn.Linear(8, 8)), config), 6)


def _is_refused(ask: Callable[..., object], *arguments: object) -> bool:
    try:
        ask(*arguments)
    except RecipeError:
        return True
    return False
