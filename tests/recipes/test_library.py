"""Every shipped recipe is valid and says what the paper says."""

import pytest

from rankbits.accounting.params import count
from rankbits.errors import ModelError
from rankbits.recipes import shipped
from rankbits.recipes.catalogue import method_names
from rankbits.recipes.load import load
from rankbits.recipes.question import from_recipe

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
# Bayesian-LoRA, table 3 (epochs) and table 4 (AdaLoRA's learning rates); alpha as in AdaLoRA's scripts.
PAPER = {
    "mnli": (7, 5e-4, 16),
    "rte": (50, 1.2e-3, 32),
    "qnli": (5, 1.2e-3, 32),
    "mrpc": (30, 1e-3, 32),
    "qqp": (5, 5e-4, 16),
    "sst2": (24, 8e-4, 16),
    "cola": (25, 5e-4, 32),
    "stsb": (25, 2.2e-3, 32),
}
DECODER = ("gsm8k", "e2e_nlg")
BUDGET = ("stsb", "mrpc", "sst2", "cola", "rte")
LETTER = ("stsb", "mrpc")
MODELS = {"minilm": "minilm", "deberta-v3-base": "microsoft/deberta-v3-base"}


@pytest.mark.parametrize("name", shipped.names())
@pytest.mark.parametrize("method", method_names())
def test_every_recipe_is_valid_with_every_method(name: str, method: str):
    # Nothing but Bayesian-LoRA learns until a budget is met.
    recipe = load(name, [f"method={method}", *(["gates.budget=null"] if method != "bayesian-lora" else [])])
    assert recipe.name == name
    assert recipe.description


@pytest.mark.parametrize("name", [name for name in shipped.names() if name.startswith("methods/")])
def test_a_recipe_of_a_method_is_named_after_it_and_runs_on_the_decoder_too(name: str):
    recipe = load(name)
    assert (name, recipe.output) == (f"methods/{recipe.method}", f"runs/{name}")
    assert (recipe.model, recipe.task.name, recipe.task.data) == ("minilm", "film-reviews", None)
    assert recipe.adapter.targets in (None, "all-linear")
    assert recipe.adapter.modules_to_save is None
    question = from_recipe(load(name, ["task.name=e2e_nlg", "model=smollm2"]))
    if recipe.method == "feature-based":
        with pytest.raises(ModelError, match="it is the table of embeddings"):
            count(question.shape, question.spec)
        return
    assert count(question.shape, question.spec).trainable > 0


def test_the_library_holds_the_quickstart_glue_for_both_encoders_the_decoder_and_every_method():
    glue = {f"glue/{model}/{task}" for model in MODELS for task in GLUE}
    glue |= {f"glue/minilm-budget/{task}" for task in BUDGET} | {f"glue/minilm-paper/{task}" for task in LETTER}
    methods = {f"methods/{name}" for name in method_names()}
    decoder = {f"{task}-smollm2{kind}" for task in DECODER for kind in ("", "-budget")}
    assert set(shipped.names()) == {"quickstart", *glue, *methods, *decoder}


@pytest.mark.parametrize("task", BUDGET)
def test_the_default_recipe_is_one_for_all_tasks(task: str):
    recipe = load(f"glue/minilm-budget/{task}")
    first = load(f"glue/minilm-budget/{BUDGET[0]}")
    assert (recipe.model, recipe.adapter, recipe.gates) == ("minilm", first.adapter, first.gates)
    assert recipe.training.model_copy(update={"epochs": first.training.epochs}) == first.training
    assert recipe.adapter.quantizers == ["weight", "input"]


@pytest.mark.parametrize("task", LETTER)
def test_the_letter_of_the_paper_has_its_penalties_and_no_phases(task: str):
    gates = load(f"glue/minilm-paper/{task}").gates
    assert (gates.lambda_q, gates.lambda_r, gates.reduction) == (1, 1, "sum")
    assert (gates.warmup, gates.ramp, gates.fixed, gates.budget) == (0, 0, 0, None)


@pytest.mark.parametrize("task", GLUE)
@pytest.mark.parametrize("model", MODELS)
def test_glue_recipes_have_the_paper_s_settings(model: str, task: str):
    recipe = load(f"glue/{model}/{task}")
    assert (recipe.model, recipe.task.name) == (MODELS[model], task)
    assert (recipe.training.epochs, recipe.training.learning_rate, recipe.adapter.alpha) == PAPER[task]
    assert (recipe.training.batch_size, recipe.adapter.r) == (32, 8)
    assert "AdaLoRA's (table 4 of the same paper)" in recipe.description


@pytest.mark.parametrize("task", DECODER)
def test_the_decoder_s_recipes_adapt_all_linear_layers_in_few_steps(task: str):
    recipe = load(f"{task}-smollm2")
    assert (recipe.model, recipe.task.name, recipe.adapter.targets) == ("smollm2", task, "all-linear")
    assert recipe.training.max_steps <= 120
    assert recipe.adapter.modules_to_save is None, "the head is the word list"


@pytest.mark.parametrize("task", DECODER)
def test_the_decoder_s_budget_changes_gates_and_quantizers_alone(task: str):
    plain, budget = load(f"{task}-smollm2"), load(f"{task}-smollm2-budget")
    assert (plain.task, plain.training) == (budget.task, budget.training)
    assert budget.gates.budget == "bits=3.5"
    same = ("r", "alpha", "targets", "modules_to_save")
    assert [getattr(plain.adapter, key) for key in same] == [getattr(budget.adapter, key) for key in same]


@pytest.mark.parametrize("base", shipped.bases())
def test_every_base_is_extended(base: str):
    recipes = [(shipped.FOLDER / f"{name}.yaml").read_text(encoding="utf-8") for name in shipped.names()]
    assert any(f"extends: {base}\n" in recipe for recipe in recipes)


def test_the_quickstart_needs_nothing_but_what_is_embedded():
    recipe = load("quickstart")
    assert (recipe.model, recipe.task.name, recipe.task.data) == ("minilm", "film-reviews", None)
