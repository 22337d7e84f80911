"""Expected against delivered: mean width and rank of each matrix under its gates, and with them decided."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from rankbits.records import ModuleRecord
from rankbits.reports.figures.canvas import BLUE, CHARACTER, INK, VERMILION, place, sheet, text_width
from rankbits.reports.figures.figure import Cell, Figure, Runs
from rankbits.reports.figures.legend import Key, draw_legend, legend_height
from rankbits.reports.figures.places import layer_order, module_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

COLUMNS = ("run", "task", "matrix", "rank", "expected_rank", "bits_mean", "expected_bits_mean")
_ROW = 0.2
_PANEL = 2.6
_GAP = 0.35
_EXPECTED = Key("expected under the gates", VERMILION, marker="D")
_DELIVERED = Key("delivered", BLUE, marker="o")
_Pairs = list[tuple[float, float] | None]
"""Delivered and expected value of each matrix; None where nothing was learned."""


def certainty(runs: Runs) -> Figure | None:
    """Expected against delivered for each matrix of one run; None if its record has no open probabilities."""
    ((name, record),) = runs.items()
    modules = sorted((m for m in record.modules if m.rank_gate or m.bit_open_probabilities), key=layer_order)
    if not modules:
        return None
    panels = {"rank": [_ranks(m) for m in modules], "mean bits of its quantizers": [_bits(m) for m in modules]}
    shown = {title: pairs for title, pairs in panels.items() if any(pairs)}
    rows: list[tuple[Cell, ...]] = [
        (name, record.data.task, m.name, *_cells(_ranks(m)), *_cells(_bits(m))) for m in modules
    ]
    apart = [abs(math.log2(pair[0] / pair[1])) for pairs in shown.values() for pair in pairs if pair is not None]
    return Figure(
        name="certainty",
        title="Expected against delivered",
        reading="A line for each matrix, from the mean under its gate probabilities to what was delivered. The longer "
        "the line, the less certain the outcome.",
        label=f"Expected and delivered {' and '.join(shown)} of {len(modules)} matrices; furthest apart by a factor of "
        f"{2 ** max(apart):.2f}.",
        columns=COLUMNS,
        rows=rows,
        draw=partial(_draw, module_labels(modules), shown),
    )


def _ranks(module: ModuleRecord) -> tuple[float, float] | None:
    return None if module.expected_rank is None else (float(module.rank), module.expected_rank)


def _bits(module: ModuleRecord) -> tuple[float, float] | None:
    sites = [site for site in module.bit_open_probabilities if site in module.bits and site in module.expected_bits]
    if not sites:
        return None
    delivered = sum(module.bits[site] for site in sites) / len(sites)
    return delivered, sum(module.expected_bits[site] for site in sites) / len(sites)


def _cells(pair: tuple[float, float] | None) -> tuple[float | None, float | None]:
    return (None, None) if pair is None else pair


def _draw(labels: list[str], panels: dict[str, _Pairs]) -> Drawing:
    left, keys = text_width(labels) + 0.15, [_DELIVERED, _EXPECTED]
    width = left + len(panels) * (_PANEL + _GAP)
    # At least as wide as the legend's two entries beside each other.
    width = max(width, 2 * (len(_EXPECTED.name) * CHARACTER + 0.7))
    foot = legend_height(keys, width) + 0.55
    height = foot + _ROW * len(labels) + 0.1
    drawing = sheet(width, height)
    for number, (title, pairs) in enumerate(panels.items()):
        axes = place(drawing, left + number * (_PANEL + _GAP), foot, _PANEL, _ROW * len(labels))
        _draw_panel(axes, title, pairs)
        axes.set_yticks(range(len(labels)), labels if number == 0 else [""] * len(labels))
    draw_legend(drawing, keys)
    return drawing


def _draw_panel(axes: Axes, title: str, pairs: _Pairs) -> None:
    for row, pair in enumerate(pairs):
        if pair is None:
            continue
        axes.plot(pair, [row, row], color=INK, alpha=0.45, linewidth=1.0)
        for value, key, size in ((pair[1], _EXPECTED, 4.0), (pair[0], _DELIVERED, 5.0)):
            axes.plot([value], [row], color=key.colour, marker=key.marker, markersize=size, markeredgewidth=0)
    most = max(value for pair in pairs if pair is not None for value in pair)
    axes.set(xlim=(0, most * 1.06), ylim=(len(pairs) - 0.5, -0.5), xlabel=title)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="x", alpha=0.18)
    axes.grid(visible=False, axis="y")
