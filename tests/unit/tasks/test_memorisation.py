"""UUID pairs: made from a seed, learned and scored on the same rows, compared character by character."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankbits import tasks
from rankbits.errors import TaskError
from rankbits.tasks.memorisation import PAIRS, right_characters

TASK = tasks.get("memorisation")


def load(**changes: Any) -> tasks.TaskData:
    return tasks.load(TASK, **({"data": None, "train_rows": None, "evaluate_on": "validation", "seed": 0} | changes))


def test_the_pairs_that_are_learned_are_the_pairs_that_are_scored() -> None:
    data = load(train_rows=40)
    assert list(data.evaluation) == ["train"]
    assert data.train.to_dict() == data.evaluation["train"].to_dict()
    assert data.train.num_rows == 40
    assert data.dropped == {"duplicate": 0}
    assert "very pairs that were learned" in TASK.description


def test_keys_and_values_are_all_different_uuids_of_32_random_digits() -> None:
    data = load()
    texts = [*data.train["key"], *data.train["value"]]
    assert len(set(texts)) == 2 * PAIRS
    assert all(len(text) == 32 for text in texts)
    # Each of 16 digits at each of 32 places: 128 expected, and no place gives a digit away (7 standard deviations).
    counts = np.array([[sum(text[i] == d for text in texts) for d in "0123456789abcdef"] for i in range(32)])
    assert abs(counts - 2 * PAIRS / 16).max() < 7 * np.sqrt(2 * PAIRS / 16)


def test_the_seed_makes_the_pairs_and_development_has_others() -> None:
    same, again, other, development = load(), load(), load(seed=1), load(evaluate_on="development")
    assert same.fingerprint == again.fingerprint
    keys = [set(data.train["key"]) for data in (same, other, development)]
    assert all(one.isdisjoint(two) for one, two in ((keys[0], keys[1]), (keys[0], keys[2]), (keys[1], keys[2])))
    assert list(development.evaluation) == ["development"]
    assert development.evaluation["development"].to_dict() == development.train.to_dict()
    assert (same.source, other.source) == ("UUIDs of seed 0", "UUIDs of seed 1")


def test_pairs_of_a_folder_are_taken_instead(tmp_path: Path) -> None:
    rows = [{"key": f"k{i}", "value": f"v{i}"} for i in (0, 1, 1)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(data=str(tmp_path))
    assert data.train["value"][:] == data.evaluation["train"]["value"][:] == ["v0", "v1"]
    assert data.dropped == {"duplicate": 1}


def test_more_pairs_than_there_are_are_refused() -> None:
    with pytest.raises(TaskError, match=f"expected 1 to {PAIRS}"):
        load(train_rows=PAIRS + 1)


@pytest.mark.parametrize(
    ("given", "right"), [("abcd", 4), ("abxd", 3), ("ab", 2), ("", 0), ("abcdabcd", 4), ("xabcd", 0)]
)
def test_characters_count_in_their_places(given: str, right: int) -> None:
    assert right_characters(given, "abcd") == right


def test_every_character_counts_once() -> None:
    # One answer of two characters and one of thirty: the mean of the answers' means would be 50.
    counts = np.array([[2, 2], [0, 30]])
    assert TASK.score(counts, counts) == {"character_accuracy": pytest.approx(100 * 2 / 32)}


def test_counts_that_cannot_be_scored_are_refused() -> None:
    with pytest.raises(TaskError, match="expected a number of right ones and a number of characters"):
        TASK.score(np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(TaskError, match="the 2 answers have no characters"):
        TASK.score(np.zeros((2, 2)), np.zeros((2, 2)))
