"""Points of the recipes that came before the study's, of which results are kept: nobody has to run them again.

*Groups of 64* came first: a float for 64 weights, one learned range for each input, widths chosen after a fifth of the
steps. Below W4A8 two other grids followed; what the study has now is the second of them.
"""

from __future__ import annotations

from dataclasses import replace

from points import (
    CLAIMED,
    CURVE_TASKS,
    DEFAULT_PLACEMENT,
    FIRST_SEED,
    LEARNING_RATE,
    MAIN_TASKS,
    MIXED,
    NARROW,
    OUR_RATE,
    SEEDS,
    SITES,
    TIGHT,
    Kind,
    Point,
    held_out,
    limits,
    lora,
    seeded,
    work,
)

RECIPE = (
    "adapter.rounding=compensated",
    "adapter.weight_gradient_rows=256",
    "gates.warmup=0.2",
    "gates.range_learning_rate=0.01",
)
GROUP_SIZE = 64
FINE = (
    "adapter.group_size=8",
    "adapter.scale_bits=8",
    "adapter.code_range=full",
    "adapter.activation_ranges=fitted",
)
"""A byte of scale for 8 weights, all codes, and inputs fitted to their width."""
LATE = ("gates.warmup=0.7", "gates.ramp=0", "gates.fixed=0")
LONGER = 6
"""Epochs after which MRPC is compared at `MIXED` once more, to see whether it is only late there."""
SCATTERED = "cola"
"""Its first seed lost five points at `NARROW`; it got the other seeds, too, to see what that says."""
UNIFORM = {NARROW: (4, 8), TIGHT: (2, 8)}
CHANGES = {
    f"lr{OUR_RATE}": (MAIN_TASKS, ()),
    "warmup0.7": (MAIN_TASKS, LATE),
    "full-codes": (("stsb",), ("adapter.code_range=full",)),
    "range-rate1e-3": (("stsb",), ("gates.range_learning_rate=0.001",)),
}
"""Name to the tasks on whose held out rows something was changed, and to what."""


def ours(placement: str) -> tuple[str, ...]:
    """What learned and fixed gates share."""
    grid = ("adapter.granularity=group", f"adapter.quantizers={SITES[placement]}", f"adapter.group_size={GROUP_SIZE}")
    return ("method=bayesian-lora", f"adapter.placement={placement}", *grid, *RECIPE)


def learned(task: str, budget: float, seed: int, placement: str = DEFAULT_PLACEMENT) -> Point:
    """Learned widths and ranks under a budget of bit operations."""
    changes = (*ours(placement), limits(budget), *work(task, seed, rate=OUR_RATE))
    return Point(task, f"q-ra-{placement}-bops{budget:g}", seed, changes=changes)


def fine(task: str, budget: float, seed: int) -> Point:
    """The same with finer grids."""
    point = learned(task, budget, seed)
    return replace(point, label=f"{point.label}-fine", changes=(*point.changes, *FINE))


def longer(point: Point) -> Point:
    """The same with `LONGER` epochs."""
    changes = (*point.changes, f"training.epochs={LONGER}")
    return replace(point, label=f"{point.label}-epochs{LONGER}", changes=changes)


def uniform(task: str, widths: tuple[int, int], seed: int) -> Point:
    """Gates that stand still at one width for all layers."""
    changes = (*ours(DEFAULT_PLACEMENT), "adapter.learn_rank=false", *work(task, seed, rate=OUR_RATE))
    return Point(task, f"uniform-w{widths[0]}a{widths[1]}-group", seed, Kind.FIXED, changes, widths=widths)


def permuted(task: str, budget: float, seed: int) -> Point:
    """Learned widths and ranks, dealt out to other layers at the same cost and trained with fixed gates."""
    changes = (*ours(DEFAULT_PLACEMENT), *work(task, seed, rate=OUR_RATE))
    return Point(task, f"permuted-bops{budget:g}", seed, Kind.FIXED, changes, source=learned(task, budget, seed).name)


def choices() -> list[Point]:
    """Runs on rows held out of training, LoRA among them."""
    points = [held_out(t, f"lora-development-lr{LEARNING_RATE}", LEARNING_RATE, "method=lora") for t in MAIN_TASKS]
    return points + [
        held_out(task, f"q-ra-development-{name}", OUR_RATE, *ours(DEFAULT_PLACEMENT), limits(NARROW), *changes)
        for name, (tasks, changes) in CHANGES.items()
        for task in tasks
    ]


def _all() -> list[Point]:
    curves = [(t, s) for s in SEEDS for t in CURVE_TASKS]
    points = [*choices(), *(learned(t, b, s) for b in CLAIMED for t, s in seeded())]
    points += [make(SCATTERED, s) for s in SEEDS[1:] for make in (lora, lambda t, s: learned(t, NARROW, s))]
    points += [learned(t, b, s) for b in (MIXED, TIGHT) for t, s in curves]
    points += [permuted(t, TIGHT, s) for t, s in curves]
    points += [fine(t, MIXED, s) for t, s in curves]
    points += [uniform(t, w, s) for w in UNIFORM.values() for t, s in curves]
    points += [longer(p) for p in (lora("mrpc", FIRST_SEED), learned("mrpc", MIXED, FIRST_SEED))]
    points += [learned("stsb", NARROW, FIRST_SEED, "separate")]
    return points


POINTS = _all()
