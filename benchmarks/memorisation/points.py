"""The points of the study, in the order in which they are run: the base, the choice of learning rates, the table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from rankbits.records import RunRecord

RESULTS = Path(__file__).resolve().parent / "results"
RATES = ("2e-3", "6e-3", "1e-2", "2e-2")
"""The same for every method, and all of them are run."""
METHODS = ("full", "lora", "mora")
SEEDS = (1, 2, 3)
"""Each makes its own pairs, and draws the order of the rows and what LoRA starts from."""
CHOICE_SEED = 4
BASE_SEED = 0
BASE = (
    "model=runs/memorisation/untrained",
    "method=full",
    "task.train_rows=512",
    "training.max_steps=300",
    "training.batch_size=64",
    "training.learning_rate=2e-3",
    "training.logging_steps=100",
    f"training.seed={BASE_SEED}",
)
CURVE = "character_accuracy"


@dataclass(frozen=True)
class Point:
    """One run.

    Args:
        name: of its file of results, without the extension.
        changes: what the recipe is changed to, the learning rate aside where it is still to be chosen.
        method: whose learning rate is to be taken; None where the changes hold one.
    """

    name: str
    changes: tuple[str, ...]
    method: str | None = None


def choices(method: str) -> dict[str, Point]:
    """The runs that choose a method's learning rate, by rate, on pairs that nothing else is measured on."""
    given = (f"method={method}", "task.evaluate_on=development", f"training.seed={CHOICE_SEED}")
    return {rate: Point(f"{method}-choice-lr{rate}", (*given, f"training.learning_rate={rate}")) for rate in RATES}


CHECKS = tuple(
    Point(f"lora-alpha{alpha}-choice-lr{rate}", (*choices("lora")[rate].changes, f"adapter.alpha={alpha}"))
    for alpha, rates in ((8, ("1e-2", "2e-2")), (32, ("6e-3", "1e-2")))
    for rate in rates
)
"""Whether LoRA would be better off with another scale, which MoRA does not have: half and double of its alpha of 16."""

POINTS = (
    Point("base", BASE),
    *(point for method in METHODS for point in choices(method).values()),
    *CHECKS,
    *(
        Point(f"{method}-seed{seed}", (f"method={method}", f"training.seed={seed}"), method)
        for seed in SEEDS
        for method in METHODS
    ),
)


def result(name: str) -> RunRecord | None:
    """The stored record of a point; None while it is not there."""
    path = RESULTS / f"{name}.json"
    return RunRecord.read(path) if path.is_file() else None


def curve(record: RunRecord) -> dict[int, float]:
    """Character accuracy in percent by the number of steps made."""
    return {round(entry["step"]): entry[CURVE] for entry in record.history if CURVE in entry}


def chosen_rate(method: str) -> str | None:
    """The rate whose character accuracy is highest, averaged over the steps of the table; None before all were run.

    Averaged, because several rates may end with everything known: then the one that was there first is the better one.
    """
    records = {rate: result(point.name) for rate, point in choices(method).items()}
    means = {rate: statistics.fmean(curve(record).values()) for rate, record in records.items() if record is not None}
    return max(means, key=means.__getitem__) if len(means) == len(RATES) else None


def changes_of(point: Point) -> tuple[str, ...] | None:
    """All that the recipe is changed to; None while the learning rate is not chosen."""
    if point.method is None:
        return point.changes
    rate = chosen_rate(point.method)
    return None if rate is None else (*point.changes, f"training.learning_rate={rate}")
