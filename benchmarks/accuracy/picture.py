"""Score against bit operations as a picture: what was learned, its rivals of equal cost, and LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import points
from comparisons import REFERENCE_RATIO
from outcomes import Sample, outcome
from points import BUDGETS, CURVE_TASKS, EQUAL_WIDTHS, SEEDS, TIGHT, Point, is_run_of_its_own
from tables import best_rounded

from rankbits.records import write_atomically
from rankbits.reports.figures.canvas import INK, PALETTE, file_svg, place, sheet
from rankbits.reports.figures.figure import Figure
from rankbits.reports.figures.legend import Key, draw_legend, legend_height

METRICS = {"stsb": "STS-B, Pearson", "mrpc": "MRPC, accuracy"}
PANEL, HIGH, LEFT, BELOW, ABOVE = 4.2, 2.8, 0.65, 0.5, 0.35
"""Inches."""
APART, ROOM = 1.015, 1.12
"""Factors: between the methods at one budget, whose ranges would hide each other, and beside the outermost budgets."""
LORA = Key("LoRA", INK, dashes=":")


class Row(NamedTuple):
    """One method at one budget; LoRA's, which has none, is given as 100 %."""

    task: str
    method: str
    bops_percent_of_32_bit: float
    score: float
    lowest: float
    highest: float
    seeds: int


@dataclass(frozen=True)
class Series:
    """One method at several budgets.

    Args:
        key: its name, colour and mark; with dashes its points are joined.
        scores: from a task and a budget to its scores, one for each seed that is done.
    """

    key: Key
    scores: Callable[[str, float], list[float]]


def _done(make: Callable[[int], Point]) -> list[float]:
    found = (outcome(make(seed).name) for seed in SEEDS)
    return [one.score for one in found if one is not None]


def _learned(variant: str, placement: str) -> Callable[[str, float], list[float]]:
    return lambda task, budget: _done(lambda seed: points.learned(task, budget, seed, variant, placement))


def _uniform(task: str, budget: float) -> list[float]:
    """Of the better pair of widths, judged by the seeds that all pairs have."""
    found = [_done(lambda seed, w=widths: points.uniform(task, w, seed)) for widths in EQUAL_WIDTHS.get(budget, ())]
    common = min(map(len, found), default=0)
    return max(found, key=lambda scores: Sample(scores[:common]).mean) if common else []


def _permuted(task: str, budget: float) -> list[float]:
    return _done(lambda seed: points.permuted(task, budget, seed)) if budget == TIGHT else []


def _rounded(task: str, budget: float) -> list[float]:
    found = (best_rounded(task, budget, seed) for seed in SEEDS)
    return [score for score in found if score is not None]


def _series() -> Iterator[Series]:
    learned = [(v, p) for p in points.PLACEMENTS[::-1] for v in points.VARIANTS[::-1] if is_run_of_its_own(v, p)]
    looks = zip(learned, PALETTE[:3], "os^", ("-", "--", "-."), strict=True)
    for (variant, placement), colour, marker, dashes in looks:
        name = f"{variant.replace('-', ' + ')}, {placement}"
        yield Series(Key(name, colour, marker=marker, dashes=dashes), _learned(variant, placement))
    rivals = {"uniform widths": _uniform, "permuted widths": _permuted, "LoRA, then rounded": _rounded}
    for (name, scores), colour, marker in zip(rivals.items(), PALETTE[3:], "DvX", strict=True):
        yield Series(Key(name, colour, marker=marker), scores)


def _rows() -> list[Row]:
    rows = []
    for task in CURVE_TASKS:
        rows += _row(task, LORA, 100.0, _done(lambda seed, task=task: points.lora(task, seed)))
        for series in _series():
            for budget in BUDGETS:
                rows += _row(task, series.key, _share(budget), series.scores(task, budget))
    return rows


def _row(task: str, key: Key, bops: float, scores: list[float]) -> list[Row]:
    """Of the seeds that there are, as a list; empty without any."""
    if not scores:
        return []
    mean, low, high = (round(value, 2) for value in (Sample(scores).mean, min(scores), max(scores)))
    return [Row(task, key.name, bops, mean, low, high, len(scores))]


def _share(budget: float) -> float:
    return 100 * budget / REFERENCE_RATIO


def figure() -> Figure:
    """Of all points that are done."""
    rows = _rows()
    return Figure(
        name="score-by-budget",
        title="Score against bit operations",
        reading="Means over the seeds that there are, with their range.",
        label="Scores of learned widths and of their rivals against bit operations, for STS-B and MRPC",
        columns=Row._fields,
        rows=[tuple(row) for row in rows],
        draw=lambda: _draw(rows),
    )


def _draw(rows: list[Row]) -> Any:
    keys = [LORA, *(series.key for series in _series())]
    width = len(CURVE_TASKS) * (LEFT + PANEL) + 0.2
    foot = legend_height(keys, width)
    drawing = sheet(width, foot + BELOW + HIGH + ABOVE)
    for number, task in enumerate(CURVE_TASKS):
        axes = place(drawing, number * (LEFT + PANEL) + LEFT, foot + BELOW, PANEL, HIGH)
        for rank, key in enumerate(keys):
            mine = [row for row in rows if (row.task, row.method) == (task, key.name)]
            _draw_line(axes, key, mine, beside=APART ** (rank - len(keys) / 2))
        axes.set_xscale("log")
        axes.set_xlim(_share(min(BUDGETS)) / ROOM, _share(max(BUDGETS)) * ROOM)
        axes.set_xticks([_share(b) for b in BUDGETS], [f"{_share(b):.2f}" for b in BUDGETS], minor=False)
        axes.set_xticks([], minor=True)
        axes.set(xlabel="bit operations, % of those at 32 bits", ylabel="score, %")
        axes.set_title(METRICS[task], loc="left", fontweight="bold")
    draw_legend(drawing, keys)
    return drawing


def _draw_line(axes: Any, key: Key, rows: list[Row], *, beside: float) -> None:
    if key == LORA:
        for row in rows:
            axes.axhline(row.score, color=key.colour, linestyle=key.dashes, linewidth=1.2)
        return
    places = [row.bops_percent_of_32_bit * beside for row in rows]
    thin = {"color": key.colour, "linewidth": 1.0, "alpha": 0.6}
    axes.vlines(places, [row.lowest for row in rows], [row.highest for row in rows], **thin)
    look = {"marker": key.marker, "markersize": key.size, "markeredgewidth": 0, "linewidth": 1.6}
    axes.plot(places, [row.score for row in rows], color=key.colour, linestyle=key.dashes or "none", **look)


def write(folder: Path) -> list[Path]:
    """Write the picture and its numbers into a folder, over older ones."""
    made = figure()
    paths = [folder / f"{made.name}.svg", folder / f"{made.name}.csv"]
    for path, text in zip(paths, (file_svg(made), made.csv()), strict=True):
        write_atomically(path, text)
    return paths
