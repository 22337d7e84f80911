"""Labelled points in panels that share one logarithmic axis of costs: the score upwards, the cost to the right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankbits.reports.figures.canvas import (
    INK,
    LINE,
    PAGE_WIDTH,
    note,
    note_lines,
    place,
    sheet,
    text_width,
)
from rankbits.reports.figures.legend import Key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

_AXES = 2.5
_HIGH = 2.1
_LEFT = 0.6
_ABOVE = 0.3
_BELOW = 0.5
_MOST_TICKS = 5
_ROOM = 1.8  # factor left free on both sides of the costs


@dataclass(frozen=True)
class Point:
    """One run: its score, its cost, and a second cost that a thin line leads to, if there are two."""

    label: str
    score: float
    cost: float
    other: float | None
    key: Key


@dataclass(frozen=True)
class Panel:
    """The runs whose scores can be compared: one task, one metric."""

    title: str
    ylabel: str
    points: list[Point]


def draw_panels(panels: list[Panel], xlabel: str, tick: Callable[[float], str], notes: list[str]) -> Drawing:
    """Panels beside each other, in as many lines as a page needs, with notes below them.

    Args:
        panels: at least one, each with at least one point of positive cost.
        xlabel: what the axis of all panels counts.
        tick: the text of a number on that axis.
        notes: sentences below the panels.
    """
    labels = max(text_width([point.label for point in panel.points]) for panel in panels) + 0.45
    across = _LEFT + _AXES + labels
    beside = min(len(panels), max(1, int(PAGE_WIDTH / across)))
    rows = -(-len(panels) // beside)
    # Labels stand below each other: with many runs a panel grows instead of its labels overlapping.
    high = max(_HIGH, LINE * 1.1 * max(len(panel.points) for panel in panels))
    lines = [line for text in notes for line in note_lines(text, beside * across)]
    foot = len(lines) * LINE * 0.92 + 0.15 if lines else 0.0
    step = _ABOVE + high + _BELOW
    drawing = sheet(beside * across, rows * step + foot)
    costs = [c for panel in panels for p in panel.points for c in (p.cost, p.other) if c is not None]
    limits = math.log10(min(costs) / _ROOM), math.log10(max(costs) * _ROOM)
    for index, panel in enumerate(panels):
        row, column = divmod(index, beside)
        bottom = foot + (rows - 1 - row) * step + _BELOW
        axes = place(drawing, column * across + _LEFT, bottom, _AXES, high)
        _draw_panel(axes, panel, limits)
        _draw_labels(axes, panel, high)
        axes.set_title(panel.title, loc="left", fontweight="bold")
        axes.set(xlabel=xlabel, ylabel=panel.ylabel)
        ticks = round_numbers(10 ** limits[0], 10 ** limits[1])
        axes.set_xticks([math.log10(number) for number in ticks], [tick(number) for number in ticks])
    if lines:
        note(drawing, "\n".join(lines))
    return drawing


def round_numbers(low: float, high: float) -> list[float]:
    """Powers of ten and a few of their multiples between `low` and `high`: the fewer, the wider the span."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [
        [number for power in powers for digit in digits if low <= (number := digit * 10.0**power) <= high]
        for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,))
    ]
    return next((numbers for numbers in choices if len(numbers) <= _MOST_TICKS), choices[-1])


def _draw_panel(axes: Axes, panel: Panel, limits: tuple[float, float]) -> None:
    for point in panel.points:
        x = math.log10(point.cost)
        if point.other is not None:
            other = math.log10(point.other)
            axes.plot([x, other], [point.score] * 2, color=point.key.colour, linewidth=0.9)
            axes.plot(
                [other], [point.score], color=point.key.colour, marker=point.key.marker, markersize=7,
                markerfacecolor="none", markeredgewidth=1.2,
            )  # fmt: skip
        axes.plot(
            [x], [point.score], color=point.key.colour, marker=point.key.marker, markersize=7, markeredgewidth=0,
            zorder=3,
        )  # fmt: skip
    scores = [point.score for point in panel.points]
    margin = max(0.25, 0.12 * (max(scores) - min(scores)))
    axes.set(xlim=limits, ylim=(min(scores) - margin, max(scores) + margin))
    axes.locator_params(axis="y", nbins=5)
    axes.grid(axis="x")


def _draw_labels(axes: Axes, panel: Panel, high: float) -> None:
    """Labels in one column beside the axes, in the order of the scores, each with a line to its point."""
    low, top = axes.get_ylim()
    points = sorted(panel.points, key=lambda point: point.score)
    wanted = [(point.score - low) / (top - low) * high for point in points]
    left, right = axes.get_xlim()
    for point, y in zip(points, spread_apart(wanted, LINE, high), strict=True):
        x = max(point.cost, point.other or 0.0)
        axes.annotate(
            point.label, ((math.log10(x) - left) / (right - left), (point.score - low) / (top - low)),
            xycoords="axes fraction", xytext=(1.08, y / high), textcoords="axes fraction", va="center", ha="left",
            arrowprops={
                "arrowstyle": "-", "color": INK, "alpha": 0.35, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def spread_apart(wanted: list[float], apart: float, high: float) -> list[float]:
    """Places near the wanted ones, in ascending order, at least `apart` from each other and at most `high`.

    Raises nothing: where they do not fit, the lowest go below zero.
    """
    places: list[float] = []
    for place_wanted in wanted:
        places.append(max(place_wanted, places[-1] + apart) if places else place_wanted)
    ceiling = high
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - apart
    return places
