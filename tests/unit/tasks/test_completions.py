"""Tasks of a language model: which rows are learned from, which are held out, and how answers are scored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankbits import tasks
from rankbits.errors import NonFiniteError, TaskError

GSM8K, E2E = tasks.get("gsm8k"), tasks.get("e2e_nlg")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def problems(count: int, kind: str) -> list[dict[str, str]]:
    return [{"question": f"{kind} {index}?", "answer": f"#### {index}"} for index in range(count)]


def restaurants(count: int, kind: str) -> list[dict[str, str]]:
    """Three descriptions of each restaurant."""
    return [
        {"meaning_representation": f"name[{kind} {index}]", "human_reference": f"{kind} {index}, said {way}"}
        for index in range(count)
        for way in ("plainly", "nicely", "briefly")
    ]


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", problems(40, "train"))
    write(tmp_path / "test.jsonl", problems(6, "test"))
    return tmp_path


@pytest.fixture
def e2e(tmp_path: Path) -> Path:
    write(tmp_path / "validation.jsonl", restaurants(20, "validation"))
    write(tmp_path / "test.jsonl", restaurants(4, "test"))
    return tmp_path


def load(folder: Path, task: tasks.Task, evaluate_on: str = "validation") -> tasks.TaskData:
    return tasks.load(task, data=str(folder), train_rows=None, evaluate_on=evaluate_on, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", [GSM8K, E2E])
def test_prompt_and_answer_show_the_texts_of_the_task(task: tasks.Task) -> None:
    shown, learned = task.text_columns
    row = {shown: "what is asked", learned: "what is said"}
    assert "what is asked" in task.prompt.format(**row)
    assert "what is said" not in task.prompt.format(**row)
    assert task.answer.format(**row) == " what is said"
    assert task.num_labels == 0


def test_gsm8k_learns_from_all_of_train_and_is_evaluated_on_test(gsm8k: Path) -> None:
    data = load(gsm8k, GSM8K)
    assert (len(data.train), list(data.evaluation), len(data.evaluation["test"])) == (40, ["test"], 6)
    assert data.train.column_names == ["question", "answer"]


def test_gsm8k_holds_a_tenth_of_train_out_for_development(gsm8k: Path) -> None:
    (gsm8k / "test.jsonl").unlink()
    data = load(gsm8k, GSM8K, "development")
    assert (len(data.train), len(data.evaluation["development"])) == (36, 4)


def test_a_question_that_is_evaluated_is_not_learned_from_whatever_its_answer(gsm8k: Path) -> None:
    write(gsm8k / "train.jsonl", [*problems(5, "train"), {"question": "test 0?", "answer": "said otherwise"}])
    data = load(gsm8k, GSM8K)
    assert len(data.train) == 5
    assert data.dropped == {"duplicate": 0, "in_evaluation": 1}


def test_e2e_cuts_validation_in_two_and_learns_from_the_same_half_always(e2e: Path) -> None:
    final, development = load(e2e, E2E), load(e2e, E2E, "development")
    assert list(final.evaluation) == ["test"]
    assert final.train["human_reference"][:] == development.train["human_reference"][:]
    assert (len(final.train), len(development.evaluation["development"])) == (30, 30)


def test_no_restaurant_is_on_both_sides(e2e: Path) -> None:
    data = load(e2e, E2E, "development")
    learned, held = (set(rows["meaning_representation"]) for rows in (data.train, data.evaluation["development"]))
    assert len(learned) == len(held) == 10
    assert not learned & held


def test_what_is_missing_is_named_by_the_splits_of_the_task(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="must hold one file validation with"):
        load(tmp_path, E2E)


def test_missing_columns_are_named_without_a_label(gsm8k: Path) -> None:
    write(gsm8k / "train.jsonl", [{"question": "1 + 1?"}])
    with pytest.raises(TaskError, match=r"no column answer; given columns: question; expected: question, answer$"):
        load(gsm8k, GSM8K)


def test_every_token_counts_once() -> None:
    # Nine tokens at 1 nat and one at 11: the mean of the rows' means would be 6.
    scores = GSM8K.score(np.array([[9.0, 9.0], [11.0, 1.0]]), np.zeros((2, 5)))
    assert scores == pytest.approx({"loss": 2.0, "perplexity": math.exp(2.0)})


def test_a_model_that_came_apart_still_gets_numbers() -> None:
    scores = GSM8K.score(np.array([[9e9, 9.0]]), np.zeros((1, 5)))
    assert scores["loss"] == pytest.approx(1e9)
    assert math.isfinite(scores["perplexity"])


def test_losses_that_are_not_finite_are_refused_with_their_row() -> None:
    with pytest.raises(NonFiniteError, match=r"1 of 2 predictions .* first at row 2"):
        GSM8K.score(np.array([[1.0, 1.0], [np.nan, 2.0]]), np.zeros((2, 5)))


@pytest.mark.parametrize("shape", [(3,), (3, 3), (2, 2), (0, 2)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TaskError, match=r"cannot be scored; expected a sum of nats"):
        GSM8K.score(np.ones(shape), np.zeros((3 if shape[0] else 0, 5)))


def test_answers_without_tokens_are_refused() -> None:
    with pytest.raises(TaskError, match="the 2 answers have no tokens"):
        GSM8K.score(np.zeros((2, 2)), np.zeros((2, 5)))
