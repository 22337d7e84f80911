"""What the schema accepts, refuses and fills in."""

import copy
from typing import Any

import pytest
from pydantic import ValidationError

from rankbits import tasks
from rankbits.recipes.catalogue import method_names
from rankbits.recipes.schema import QUANTIZER_SITES, Recipe
from rankbits.records import SITES

SMALLEST: dict[str, Any] = {
    "name": "small",
    "task": {"name": "rte"},
    "model": "minilm",
    "training": {"epochs": 1, "learning_rate": 1e-3},
}


def _with(key: str, value: object) -> dict[str, Any]:
    raw = copy.deepcopy(SMALLEST)
    *sections, last = key.split(".")
    place = raw
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return raw


def _wrong_keys(raw: dict[str, Any]) -> set[str]:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(raw)
    return {".".join(str(part) for part in detail["loc"][:2]) for detail in caught.value.errors()}


def test_defaults_are_the_package_s():
    recipe = Recipe.model_validate(SMALLEST)
    assert recipe.method == "bayesian-lora"
    assert (recipe.adapter.r, recipe.adapter.alpha, recipe.adapter.rank_gate) == (8, 16, "ste")
    assert (recipe.adapter.initial_bit_logit, recipe.adapter.initial_rank_logit) == (6.0, 6.0)
    assert recipe.adapter.calibration_passes == 50
    assert (recipe.gates.warmup, recipe.gates.ramp, recipe.gates.fixed) == (0.25, 0.25, 0.25)
    assert (recipe.gates.lambda_q, recipe.gates.lambda_r, recipe.gates.budget) == (None, None, None)
    assert (recipe.gates.reference_bits, recipe.gates.scope, recipe.gates.learning_rate) == (16, "adapted", "auto")
    assert (recipe.training.seed, recipe.training.scheduler, recipe.training.weight_decay) == (42, "linear", 0)
    assert recipe.output is None


def test_a_recipe_cannot_be_changed():
    recipe = Recipe.model_validate(SMALLEST)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.seed = 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter.targets", "all-linear"),
        ("adapter.targets", ["query", "value"]),
        ("adapter.targets", None),
        ("adapter.quantizers", ["weight", "input"]),
        ("adapter.quantizers", []),
        ("adapter.alpha", 32),
        ("gates.learning_rate", 0.01),
        ("gates.lambda_q", 0),
        ("gates.fixed", 0.5),
        ("training.epochs", 0.5),
        ("task.evaluate_on", "development"),
        ("task.data", "folder"),
        ("method", "lora"),
    ],
)
def test_accepted(key: str, value: object):
    Recipe.model_validate(_with(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ""),
        ("name", "../outside"),
        ("name", "a/../../b"),
        ("name", "/absolute"),
        ("task.name", "stbs"),
        ("task.train_rows", 0),
        ("task.max_length", "64"),
        ("task.evaluate_on", "test"),
        ("task.data", ""),
        ("model", ""),
        ("method", "dorra"),
        ("adapter.r", 0),
        ("adapter.r", 8.0),
        ("adapter.r", True),
        ("adapter.alpha", 0),
        ("adapter.dropout", 1),
        ("adapter.dropout", -0.1),
        ("adapter.targets", []),
        ("adapter.targets", 3),
        ("adapter.learn_bits", "yes"),
        ("adapter.rank_gate", "soft"),
        ("adapter.init_weights", "gaussian"),
        ("adapter.quantizers", ["weights"]),
        ("adapter.calibration_passes", 0),
        ("adapter.initial_bit_logit", float("nan")),
        ("gates.lambda_q", -1e-3),
        ("gates.lambda_r", -1e-3),
        ("gates.warmup", -0.1),
        ("gates.fixed", 0.51),
        ("gates.learning_rate", "fast"),
        ("gates.learning_rate", 0),
        ("gates.weighting", "bops"),
        ("gates.reduction", "max"),
        ("training.epochs", 0),
        ("training.epochs", None),
        ("training.max_steps", 0),
        ("training.batch_size", 0),
        ("training.learning_rate", float("inf")),
        ("training.learning_rate", "5e-4"),
        ("training.warmup_ratio", 1),
        ("training.scheduler", "polynomial"),
        ("training.weight_decay", -1),
        ("training.seed", -1),
        ("training.precision", "fp8"),
        ("training.report_to", "wandb"),
        ("output", ""),
        ("unknown", 1),
        ("adapter.unknown", 1),
        ("adapter", None),
    ],
)
def test_refused_at_its_key(key: str, value: object):
    assert _wrong_keys(_with(key, value)) == {key}


def test_phases_are_added_up_even_if_another_key_of_the_section_is_wrong():
    raw = _with("gates", {"warmup": 0.5, "ramp": 0.4, "fixed": 0.2, "lambda_q": "much"})
    assert _wrong_keys(raw) == {"gates.fixed", "gates.lambda_q"}


def test_phases_may_fill_the_training_exactly():
    Recipe.model_validate(_with("gates", {"warmup": 0.7, "ramp": 0.2, "fixed": 0.1}))


def test_max_steps_is_length_enough():
    Recipe.model_validate(_with("training", {"max_steps": 5, "learning_rate": 1e-3}))


def test_the_constant_scheduler_has_no_warmup():
    raw = _with("training", {"epochs": 1, "learning_rate": 1e-3, "warmup_ratio": 0.03, "scheduler": "constant"})
    assert _wrong_keys(raw) == {"training.scheduler"}
    raw["training"]["scheduler"] = "constant_with_warmup"
    Recipe.model_validate(raw)


def test_every_task_and_method_that_is_listed_is_accepted():
    for name in tasks.names():
        Recipe.model_validate(_with("task.name", name))
    for name in method_names():
        Recipe.model_validate(_with("method", name))


def test_quantizer_sites_are_those_that_records_know():
    assert (*QUANTIZER_SITES, "probabilities") == SITES


@pytest.mark.parametrize("budget", ["bops=0.25", ["bits=4", "rank=2.5"], None])
def test_budgets_are_texts_of_their_own_form(budget):
    assert Recipe.model_validate(SMALLEST | {"gates": {"budget": budget}}).gates.budget == budget


@pytest.mark.parametrize("budget", ["bops", "flops=1", ["bits=4", "bits"], [], 4.0])
def test_other_budgets_are_refused(budget):
    with pytest.raises(ValidationError):
        Recipe.model_validate(SMALLEST | {"gates": {"budget": budget}})


def test_dropout_has_no_place_beside_a_merged_update():
    raw = _with("adapter.placement", "merged")
    Recipe.model_validate(raw)
    raw["adapter"]["dropout"] = 0.1
    assert _wrong_keys(raw) == {"adapter.placement"}
