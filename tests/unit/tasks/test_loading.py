"""Loading a task: the rows that a run sees, always the same ones, and the errors that stop it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from rankbits import tasks
from rankbits.errors import TaskError

SST2, STSB, MNLI, FILMS = (tasks.get(name) for name in ("sst2", "stsb", "mnli", "film-reviews"))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sentences(count: int, kind: str) -> list[dict[str, Any]]:
    return [{"sentence": f"{kind} {index}", "label": index % 2, "idx": index} for index in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty training rows, one of them doubled and one of them evaluated, and three rows to evaluate."""
    root = tmp_path / "sst2"
    doubled, leaked = {"sentence": "train 0", "label": 0}, {"sentence": "validation 0", "label": 1}
    write(root / "train.jsonl", [*sentences(40, "train"), doubled, leaked])
    write(root / "validation.jsonl", sentences(3, "validation"))
    return root


def load(folder: Path | str | None, task: tasks.Task = SST2, **changes: Any) -> tasks.TaskData:
    arguments: dict[str, Any] = {"train_rows": None, "evaluate_on": "validation", "seed": 0} | changes
    return tasks.load(task, data=None if folder is None else str(folder), **arguments)


def test_duplicates_and_evaluated_texts_leave_the_training_rows(folder: Path) -> None:
    data = load(folder)
    assert data.train["sentence"][:] == [f"train {index}" for index in range(40)]
    assert data.evaluation["validation"]["sentence"][:] == [f"validation {index}" for index in range(3)]
    assert data.dropped == {"duplicate": 1, "in_evaluation": 1}
    assert data.source == "folder sst2"


def test_columns_are_the_texts_and_the_label_and_no_other(folder: Path) -> None:
    data = load(folder)
    expected = {"sentence": datasets.Value("string"), "label": datasets.Value("int64")}
    assert data.train.features == data.evaluation["validation"].features == expected
    assert data.train.column_names == ["sentence", "label"]


def test_labels_of_a_regression_stay_exact_floats(tmp_path: Path) -> None:
    pair = {"sentence1": "a", "sentence2": "b"}
    write(tmp_path / "train.jsonl", [pair | {"label": 3.8}, pair | {"sentence1": "c", "label": 5}])
    write(tmp_path / "validation.jsonl", [{"sentence1": "c", "sentence2": "d", "label": 0}])
    data = load(tmp_path, STSB)
    assert data.train["label"][:] == [3.8, 5.0]
    assert data.train.features["label"] == datasets.Value("float64")
    assert data.dropped == {"duplicate": 0, "in_evaluation": 0, "swapped_in_evaluation": 0}


def test_mnli_is_evaluated_on_both_splits_and_trained_on_neither(tmp_path: Path) -> None:
    rows = [{"premise": "p", "hypothesis": str(index), "label": index} for index in range(3)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "validation_matched.jsonl", rows[:1])
    write(tmp_path / "validation_mismatched.jsonl", rows[1:2])
    data = load(tmp_path, MNLI)
    assert {name: part["hypothesis"][:] for name, part in data.evaluation.items()} == {
        "validation_matched": ["0"],
        "validation_mismatched": ["1"],
    }
    assert data.train["hypothesis"][:] == ["2"]


def test_development_holds_out_a_tenth_and_never_reads_the_validation_split(folder: Path) -> None:
    (folder / "validation.jsonl").unlink()
    data = load(folder, evaluate_on="development")
    assert list(data.evaluation) == ["development"]
    held, kept = set(data.evaluation["development"]["sentence"]), set(data.train["sentence"])
    # 41 rows without the duplicate; a tenth, rounded up.
    assert (len(held), len(kept), len(held | kept)) == (5, 36, 41)


@pytest.mark.parametrize("evaluate_on", ["validation", "development"])
def test_the_seed_moves_no_row(folder: Path, evaluate_on: str) -> None:
    first, second = (load(folder, evaluate_on=evaluate_on, train_rows=9, seed=seed) for seed in (0, 1))
    assert first.fingerprint == second.fingerprint
    assert first.train["sentence"][:] == second.train["sentence"][:]


def test_the_hash_seed_of_python_moves_no_row(folder: Path) -> None:
    code = (
        "import sys; from rankbits import tasks; print(tasks.load(tasks.get('sst2'), data=sys.argv[1], train_rows=9, "
        "evaluate_on='development', seed=0).fingerprint)"
    )
    prints = [
        subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert prints == [load(folder, evaluate_on="development", train_rows=9).fingerprint] * 2


def test_a_subset_has_the_rows_asked_for_out_of_the_clean_ones(folder: Path) -> None:
    data = load(folder, train_rows=39)
    assert len(set(data.train["sentence"])) == 39
    assert all(text.startswith("train") for text in data.train["sentence"])
    assert len(data.evaluation["validation"]) == 3


@pytest.mark.parametrize("count", [0, -1, 41])
def test_a_subset_of_more_rows_than_there_are_is_refused(folder: Path, count: int) -> None:
    with pytest.raises(TaskError, match=rf"train_rows is {count}, expected 1 to 40"):
        load(folder, train_rows=count)


def test_the_fingerprint_is_over_the_rows_used(folder: Path) -> None:
    every, drawn = load(folder), load(folder, train_rows=40)
    assert every.fingerprint == drawn.fingerprint
    assert load(folder, train_rows=39).fingerprint != every.fingerprint
    write(folder / "validation.jsonl", sentences(2, "validation"))
    assert load(folder).fingerprint != every.fingerprint


def test_nothing_left_to_train_on_is_refused(folder: Path) -> None:
    write(folder / "train.jsonl", sentences(3, "validation"))
    with pytest.raises(TaskError, match="no training row is left"):
        load(folder)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split_is_refused(folder: Path, split: str) -> None:
    write(folder / f"{split}.jsonl", [])
    with pytest.raises(TaskError, match=rf"{split}\.jsonl is empty"):
        load(folder)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_outside_the_range_are_refused_in_every_split(folder: Path, split: str) -> None:
    write(folder / f"{split}.jsonl", [{"sentence": "a", "label": 1}, {"sentence": "b", "label": -1}])
    with pytest.raises(TaskError, match=rf"{split}\.jsonl, row 2: label is -1"):
        load(folder)


def test_missing_columns_are_refused(folder: Path) -> None:
    write(folder / "train.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(TaskError, match="no column sentence; given columns: text, label"):
        load(folder)


def test_films_of_a_folder_are_needed_only_to_hold_them_out(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    write(tmp_path / "validation.jsonl", [{"text": "c", "label": 1}])
    assert load(tmp_path, FILMS).train["text"][:] == ["a", "b"]
    with pytest.raises(TaskError, match="no column film"):
        load(tmp_path, FILMS, evaluate_on="development")


def test_an_unknown_evaluation_is_refused(folder: Path) -> None:
    with pytest.raises(TaskError, match="evaluate_on is 'test', expected one of"):
        load(folder, evaluate_on="test")


def test_the_data_folder_of_the_environment_stands_in_for_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKBITS_DATA", str(folder.parent))
    assert load(None).fingerprint == load(folder).fingerprint


def test_a_task_that_the_data_folder_lacks_comes_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKBITS_DATA", str(folder.parent))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError, match=r"load_dataset\('glue', 'mnli'\) failed"):
        load(None, MNLI)


def test_without_a_data_folder_glue_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKBITS_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError, match=r"load_dataset\('glue', 'sst2'\) failed"):
        load(None)


def test_a_data_folder_that_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKBITS_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(TaskError, match="RANKBITS_DATA names no folder"):
        load(None)
