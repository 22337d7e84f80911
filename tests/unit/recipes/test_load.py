"""From files and overrides to one recipe, and every problem at once."""

from pathlib import Path

import pytest

from rankbits.errors import RecipeError
from rankbits.recipes.load import load, names, resolved_yaml

SMALL = """
task: {name: rte}
model: minilm
training: {epochs: 1, learning_rate: 1e-3}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "own.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def _message(recipe: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(recipe, overrides)
    return str(caught.value)


def _problems(recipe: str, *overrides: str) -> list[str]:
    return [line.strip() for line in _message(recipe, *overrides).splitlines()[1:]]


def test_a_shipped_recipe_is_found_by_name_and_named_by_it():
    recipe = load("glue/minilm/stsb")
    assert recipe.name == "glue/minilm/stsb"
    assert recipe.task.name == "stsb"
    assert recipe.model == "minilm"
    assert "quickstart" in names()


def test_a_file_is_found_by_path_and_named_by_it(write):
    assert load(write(SMALL, "my own recipe.yaml")).name == "my-own-recipe"


def test_exponents_without_a_point_are_numbers(write):
    assert load(write(SMALL)).training.learning_rate == 1e-3


def test_a_recipe_states_only_its_difference(write):
    recipe = load(write("extends: quickstart\nadapter: {r: 4}"))
    assert recipe.adapter.r == 4
    assert recipe.adapter.targets == load("quickstart").adapter.targets
    assert recipe.task == load("quickstart").task


def test_extends_is_relative_to_the_file(write):
    write(SMALL, "bases/base.yaml")
    assert load(write("extends: ../bases/base.yaml\nmethod: lora", "recipes/mine.yaml")).method == "lora"


def test_name_and_output_are_not_inherited(write):
    write(SMALL + "name: first\noutput: somewhere", "base.yaml")
    recipe = load(write("extends: base.yaml", "mine.yaml"))
    assert (recipe.name, recipe.output) == ("mine", "runs/mine")


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones():
    recipe = load("quickstart", ["training.seed=1", "adapter.targets=[query]", "training.seed=2", "output=here"])
    assert recipe.training.seed == 2
    assert recipe.adapter.targets == ["query"]
    assert recipe.output == "here"


def test_overrides_have_the_types_that_they_look_like():
    recipe = load("quickstart", ["training.learning_rate=5e-4", "task.train_rows=null", "adapter.learn_bits=false"])
    assert recipe.training.learning_rate == 5e-4
    assert recipe.task.train_rows is None
    assert recipe.adapter.learn_bits is False


def test_runs_of_other_methods_get_another_folder():
    assert load("quickstart").output == "runs/quickstart"
    assert load("quickstart", ["method=lora"]).output == "runs/quickstart-lora"
    assert load("quickstart", ["name=mine", "output=null"]).output == "runs/mine"


def test_the_resolved_recipe_is_a_recipe(write):
    recipe = load("glue/deberta-v3-base/cola", ["gates.eps=1e-5"])
    assert load(write(resolved_yaml(recipe))) == recipe


def test_interpolation(write):
    assert load(write(SMALL + "output: out/${task.name}")).output == "out/rte"


def test_all_problems_come_together(write):
    path = write("tsk: 1\n" + SMALL + "adapter: {r: 0}\ngates: {warmup: 0.9}\nmethod: loar")
    problems = _problems(
        path, "training.epohcs=3", "no-equals", "training.seed=x", "epochs=4", "adapter.quantizers=[w]"
    )
    assert len(problems) == 9
    text = "\n".join(problems)
    assert f"tsk: unknown key; nearest valid key: task [{path}]" in problems
    assert f"adapter.r: given 0, expected a whole number of at least 1: the maximum rank [{path}]" in problems
    assert "warmup + ramp + fixed of at most 1, they are 0.9 + 0.25 + 0.25 = 1.4" in text
    assert "method: given the text 'loar', expected one of the known methods: bayesian-lora, lora, rslora," in text
    assert "unknown key; nearest valid key: training.epochs [override training.epohcs=3]" in text
    assert "epochs: unknown key; nearest valid key: training.epochs [override epochs=4]" in problems
    assert "given 'no-equals', expected key=value such as training.epochs=3" in text
    assert "training.seed: given the text 'x', expected a whole number from 0 to 4294967295" in text
    assert 'adapter.quantizers: given ["w"], expected one of the known quantizer sites: weight,' in text


def test_one_problem_is_announced_as_one():
    assert _message("quickstart", "training.seed=x").startswith("recipe quickstart has a problem:\n")


def test_the_last_place_that_wrote_a_key_is_named(write):
    path = write(SMALL + "adapter: {r: 0}")
    assert _problems(path)[0].endswith(f"[{path}]")
    assert _problems(path, "adapter.r=-1")[0].endswith("[override adapter.r=-1]")


def test_neither_epochs_nor_max_steps(write):
    path = write("task: {name: rte}\nmodel: minilm\ntraining: {learning_rate: 1e-3}")
    assert _problems(path) == ["training.epochs: given nothing, expected a number above 0 here, or training.max_steps"]


def test_a_syntax_error_is_shown_with_its_line_beside_wrong_overrides(write):
    problems = _problems(write("task:\n  name: [rte\nmodel: minilm\n"), "training.epohcs=3")
    assert "is not valid YAML: line 3" in problems[0]
    assert "training.epohcs: unknown key; nearest valid key: training.epochs" in problems[1]
    assert len(problems) == 2


def test_a_key_given_twice(write):
    assert "line 6" in _message(write(SMALL + "method: lora\nmethod: lora"))


@pytest.mark.parametrize("text", ["- 1\n- 2", "42", "just words", "true"])
def test_a_file_that_holds_no_keys(write, text: str):
    assert "expected keys such as `task:` and `model:`" in _message(write(text))


def test_an_empty_file_lacks_what_is_required(write):
    assert [problem.partition(":")[0] for problem in _problems(write(""))] == ["task", "model", "training"]


def test_a_file_that_is_no_text(tmp_path: Path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in _message(str(path))


def test_an_override_that_is_no_yaml():
    assert "adapter.targets: the value cannot be read" in _message("quickstart", "adapter.targets=[query")


@pytest.mark.parametrize("override", ["=3", "training..seed=3", ".seed=3"])
def test_an_override_without_a_key(override: str):
    assert "expected key=value" in _message("quickstart", override)


def test_an_interpolation_that_leads_nowhere_is_one_problem():
    assert len(_problems("quickstart", "training.seed=${nowhere}")) == 1


def test_a_section_that_is_no_section():
    assert "task: given the text 'rte', expected a section with the keys name, data" in _message(
        "quickstart", "task=rte"
    )


def test_only_one_level_of_extends(write):
    problems = _problems(write("extends: glue/minilm/stsb\nadapter: {r: x}"))
    assert "itself extends 'glue/base-minilm'" in problems[0]
    assert problems[1].startswith("adapter.r: ")
    assert len(problems) == 2


def test_extends_of_what_is_not_there(write):
    message = _message(write("extends: glue/minilm/stbs"))
    assert "no recipe 'glue/minilm/stbs'" in message
    assert "glue/minilm/stsb" in message


def test_extends_that_is_no_name(write):
    assert "extends: given 3, expected the name" in _message(write("extends: 3"))


def test_a_recipe_that_does_not_exist_names_the_nearest():
    assert "nearest shipped: quickstart" in _message("quickstrat")
    assert "glue/minilm-budget/stsb" in _message("stsb")


def test_a_folder_is_no_recipe(tmp_path: Path):
    assert "it is a folder" in _message(str(tmp_path))


def test_a_base_cannot_be_run():
    assert "only there to be extended" in _message("glue/base-minilm")
