"""The stored LoRA result stands beside a run only if both did the same work."""

from pathlib import Path

import pytest

from rankbits.cli.neighbour import differences, find_neighbour
from rankbits.errors import RecordError
from rankbits.records import recipe_hash


def test_without_a_stored_result_it_says_how_to_make_one(tmp_path: Path, finished):
    neighbour, note = find_neighbour(finished(), tmp_path / "none.json")
    assert neighbour is None
    assert "`make baseline`" in note


def test_the_same_work_is_shown_with_its_hash_and_seed(tmp_path: Path, finished):
    lora = finished("method=lora", "output=runs/baseline", "training.save_steps=7")
    lora.write(tmp_path / "lora.json")
    neighbour, note = find_neighbour(finished("gates.lambda_q=0.1"), tmp_path / "lora.json")
    assert neighbour == lora
    assert lora.recipe_hash[:12] in note
    assert "seed 42" in note


def test_a_stored_result_from_before_a_key_existed_is_of_the_same_work(tmp_path: Path, finished):
    lora = finished("method=lora")
    training = {key: value for key, value in lora.recipe["training"].items() if key != "group_by_length"}
    recipe = {**lora.recipe, "training": training}
    old = lora.model_copy(update={"recipe": recipe, "recipe_hash": recipe_hash(recipe)})
    old.write(tmp_path / "lora.json")
    assert find_neighbour(finished(), tmp_path / "lora.json")[0] == old
    assert find_neighbour(finished("training.group_by_length=true"), tmp_path / "lora.json")[0] is None


def test_the_result_that_is_shipped_is_of_the_quickstart_as_it_is(finished):
    neighbour, note = find_neighbour(finished())
    assert neighbour is not None, note


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("training.seed=1", "training.seed: 1 here, 42 there"),
        ("task.train_rows=100", "task.train_rows: 100 here, 4000 there"),
        ("model=other", "model: other here, minilm there"),
    ],
)
def test_other_work_is_not_shown_and_the_difference_is_told(tmp_path: Path, finished, override: str, difference: str):
    finished("method=lora").write(tmp_path / "lora.json")
    neighbour, note = find_neighbour(finished(override), tmp_path / "lora.json")
    assert neighbour is None
    assert difference in note
    assert "`make baseline`" in note


def test_a_key_that_only_one_recipe_has_is_a_difference():
    here = {"task": {"name": "rte"}, "model": "m", "training": {"epochs": 1}}
    there = {"task": {"name": "rte"}, "model": "m", "training": {}}
    assert differences(here, there) == ["training.epochs: 1 here, None there"]


def test_a_stored_result_that_cannot_be_read_is_an_error(tmp_path: Path, finished):
    (tmp_path / "lora.json").write_text("{}")
    with pytest.raises(RecordError):
        find_neighbour(finished(), tmp_path / "lora.json")
