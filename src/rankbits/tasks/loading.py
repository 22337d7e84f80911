"""From a task's name for its data to the rows a run trains on and is scored on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from rankbits.errors import TaskError
from rankbits.tasks import film_reviews, memorisation
from rankbits.tasks.rows import Row, rows_of
from rankbits.tasks.sources import Source, folder_source, hub_source, named_source
from rankbits.tasks.splits import fingerprint, hold_out, subset, without_duplicates, without_groups_of, without_texts_of
from rankbits.tasks.task import Task

if TYPE_CHECKING:
    import datasets

EvaluateOn = Literal["validation", "development"]
DEVELOPMENT_FRACTION = 0.1
DATA_VARIABLE = "RANKBITS_DATA"


@dataclass(frozen=True)
class TaskData:
    """The rows of one run; every data set has the task's text columns and, where it has labels, "label", no others.

    Args:
        train: rows to learn from.
        evaluation: rows to be scored on, by the name of their split.
        dropped: how many rows were removed, by reason.
        fingerprint: SHA-256 in hex over all rows above, in order.
        source: where they came from, for records; never an absolute path.
    """

    train: datasets.Dataset
    evaluation: dict[str, datasets.Dataset]
    dropped: dict[str, int]
    fingerprint: str
    source: str


def load(task: Task, *, data: str | None, train_rows: int | None, evaluate_on: EvaluateOn, seed: int) -> TaskData:
    """Read a task's rows, remove duplicates and overlaps, and take the subset asked for.

    A memorised task is scored on the subset itself, and what is taken for development is a set of its own.

    Args:
        task: what to load.
        data: a folder, or the name of a set on the hub. None means the embedded file for the film reviews and pairs
            made from the seed for memorisation; for all others it means the folder of the task's name in $RANKBITS_DATA
            if there is one, else the hub.
        train_rows: how many training rows to draw, after all others were removed; None means all.
        evaluate_on: "validation" is the official split (for the film reviews, ours; for a task whose answers to the
            test split are published, that one). "development" is a tenth of the training rows, or what the task sets
            aside of them, for choices that must not be made on the official split, which is not read.
        seed: the run's seed, which moves no row: all seeds and methods are compared on the same ones. Only pairs to be
            memorised are made from it: what one seed's pairs are like says nothing about others.

    Raises:
        TaskError: the data is missing, malformed or empty, holds labels outside the task's range, or has fewer rows
            than asked for.
        AssetError: the embedded file is missing or is another file.
    """
    if evaluate_on not in get_args(EvaluateOn):
        raise TaskError(f"task {task.name}: evaluate_on is {evaluate_on!r}, expected one of {get_args(EvaluateOn)}")
    source = _source(task, data, seed)
    if task.memorised:
        return _memorised(task, source, "development" if evaluate_on == "development" else task.train_name, train_rows)
    develop, complete = evaluate_on == "development", task.kind == "completion"
    # Whole films must be held out, so that only then the rows of a folder or a hub set need to name them.
    train, duplicates = without_duplicates(rows_of(source.read(task.train_name), task, with_group=develop or complete))
    held: list[Row] = []
    if develop or task.set_aside:
        train, held = hold_out(train, task.set_aside or DEVELOPMENT_FRACTION, salt="development")
    if develop:
        evaluation = {"development": held}
    else:
        evaluation = {name: rows_of(source.read(name), task, with_group=complete) for name in task.validation_names}
    evaluated = [row for rows in evaluation.values() for row in rows]
    if complete:
        train, overlaps = without_groups_of(train, evaluated)
    else:
        train, overlaps = without_texts_of(train, evaluated, symmetric=task.symmetric)
    train = _drawn(train, train_rows, task)
    return TaskData(
        train=_dataset(train, task),
        evaluation={name: _dataset(rows, task) for name, rows in evaluation.items()},
        dropped={"duplicate": source.duplicates + duplicates, **overlaps},
        fingerprint=fingerprint([("train", train), *evaluation.items()]),
        source=source.description,
    )


def _memorised(task: Task, source: Source, split: str, train_rows: int | None) -> TaskData:
    """One split's rows both to learn from and to be scored on."""
    rows, duplicates = without_duplicates(rows_of(source.read(split), task))
    learned = _drawn(rows, train_rows, task)
    return TaskData(
        train=_dataset(learned, task),
        evaluation={split: _dataset(learned, task)},
        dropped={"duplicate": source.duplicates + duplicates},
        fingerprint=fingerprint([(split, learned)]),
        source=source.description,
    )


def _source(task: Task, data: str | None, seed: int) -> Source:
    if data is not None:
        return named_source(task, data)
    if task.memorised:
        return memorisation.made_source(seed)
    if task.hub_name is None:
        return film_reviews.embedded_source()
    local = os.environ.get(DATA_VARIABLE)
    if local:
        if not Path(local).is_dir():
            raise TaskError(f"task {task.name}: {DATA_VARIABLE} names no folder: {local!r}")
        # A folder may hold only some of the tasks; the others still come from the hub.
        if (Path(local) / task.name).is_dir():
            return folder_source(task, Path(local) / task.name)
    return hub_source(task, task.hub_name)


def _drawn(train: list[Row], count: int | None, task: Task) -> list[Row]:
    """The training rows asked for, or all of them."""
    if not train:
        raise TaskError(
            f"task {task.name}: no training row is left once duplicates, held-out rows and rows that also occur in the "
            "evaluation split are removed"
        )
    if count is None:
        return train
    if not 1 <= count <= len(train):
        raise TaskError(f"task {task.name}: train_rows is {count}, expected 1 to {len(train)}, the rows there are")
    return subset(train, count)


def _dataset(rows: list[Row], task: Task) -> datasets.Dataset:
    import datasets

    columns: dict[str, list[object]] = {
        name: [row.texts[index] for row in rows] for index, name in enumerate(task.text_columns)
    }
    features = {name: datasets.Value("string") for name in task.text_columns}
    if task.label_column:
        columns["label"] = [row.label for row in rows]
        features["label"] = datasets.Value("float64" if task.kind == "regression" else "int64")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
