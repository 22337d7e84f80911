"""Pairs of random UUIDs to be known by heart: nothing but memory can tell a value from its key (Jiang et al. 2024)."""

from __future__ import annotations

import random
import uuid

from rankbits.tasks.sources import Source, Table
from rankbits.tasks.task import Task

PAIRS = 1024
"""Pairs that there are; `train_rows` takes some of them."""

TASK = Task(
    name="memorisation",
    description=(
        "UUID pairs, as MoRA was tested with (Jiang et al. 2024): values are generated from their keys and compared "
        "character by character, on the very pairs that were learned, which the seed makes"
    ),
    text_columns=("key", "value"),
    kind="completion",
    label_names=(),
    label_column=None,
    metrics=("character_accuracy",),
    primary_metric="character_accuracy",
    validation_names=("train",),
    memorised=True,
    prompt="{key}:",
    answer="{value}",
)


def made_source(seed: int) -> Source:
    """Pairs made from a seed, the splits of one seed having none in common: "train", and "development" for choices.

    A UUID is written as its 32 hexadecimal digits, all of them drawn, so that chance gets a sixteenth of them right;
    the hyphens and the version of the usual spelling would be known beforehand.
    """

    def read(split: str) -> Table:
        drawn = random.Random(f"{split} {seed}")
        uuids: list[object] = [uuid.UUID(int=drawn.getrandbits(128)).hex for _ in range(2 * PAIRS)]
        return Table({"key": uuids[:PAIRS], "value": uuids[PAIRS:]}, origin=f"{split} of the UUIDs of seed {seed}")

    return Source(f"UUIDs of seed {seed}", read)


def right_characters(given: str, wanted: str) -> int:
    """How many characters of a value stand in their place in what was generated; what is missing is wrong."""
    return sum(one == other for one, other in zip(given, wanted, strict=False))
