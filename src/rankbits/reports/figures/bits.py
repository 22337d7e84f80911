"""Learned bit widths: each quantizer of a run, how they spread by kind, and by kind over runs (figure 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import quantiles
from typing import TYPE_CHECKING

from rankbits.records import SITES, RunRecord, Site
from rankbits.reports.figures.canvas import BLUE, INK, VERMILION, place, sheet
from rankbits.reports.figures.figure import Cell, Figure, Runs
from rankbits.reports.figures.heatmap import Grid, draw_grids
from rankbits.reports.figures.legend import Key, draw_legend, legend_height, marked
from rankbits.reports.figures.places import layer_order, module_labels
from rankbits.reports.tables import SITE_LABELS, has_bits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

COLUMNS = ("run", "task", "matrix", "layer", "kind", "quantizer", "bits")
_WIDTHS = (2, 4, 8, 16, 32)
_Spread = dict[Site, list[int]]


def bits_by_matrix(runs: Runs) -> Figure | None:
    """A cell for each quantizer of one run; None if it quantized nothing."""
    ((name, record),) = runs.items()
    if not has_bits(record):
        return None
    modules = sorted((module for module in record.modules if module.bits), key=layer_order)
    sites = list(_spread(record))
    cells = {
        (row, column): float(module.bits[site])
        for row, module in enumerate(modules)
        for column, site in enumerate(sites)
        if site in module.bits
    }
    grid = Grid(module_labels(modules), [SITE_LABELS[site] for site in sites], cells)
    return Figure(
        name="bits-by-matrix",
        title="Bits of each quantizer",
        reading="Rows are matrices, columns the tensors that are quantized. The lighter, the wider.",
        label=f"Heat map of bit widths: {len(modules)} matrices by {len(sites)} quantizers, "
        f"from {min(cells.values()):.0f} to {max(cells.values()):.0f} bits.",
        columns=COLUMNS,
        rows=_rows({name: record}),
        draw=lambda: draw_grids([grid], lambda bits: (math.log2(bits) - 1) / 4),
    )


def bits_by_quantizer(runs: Runs) -> Figure | None:
    """How the widths of each kind of quantizer of one run spread over its matrices; None if it quantized nothing."""
    ((name, record),) = runs.items()
    if not has_bits(record):
        return None
    spread = _spread(record)
    means = ", ".join(f"{SITE_LABELS[site]} {sum(bits) / len(bits):.1f}" for site, bits in spread.items())
    return Figure(
        name="bits-by-quantizer",
        title="Bits, by quantizer",
        reading="A dot is one matrix; box: quartiles and median; diamond and number on top: mean.",
        label=f"Spread of bit widths over matrices, by quantizer. Means in bits: {means}.",
        columns=COLUMNS,
        rows=_rows({name: record}),
        draw=partial(_draw_boxes, spread),
    )


def bits_by_run(runs: Runs) -> Figure | None:
    """How the widths of each kind of quantizer spread, runs beside each other; None with fewer than two such runs."""
    spreads = {name: _spread(record) for name, record in runs.items() if has_bits(record)}
    if len(spreads) < 2:
        return None
    sites = [site for site in SITES if any(site in spread for spread in spreads.values())]
    tasks = len({runs[name].data.task for name in spreads})
    return Figure(
        name="bits-by-run",
        title="Bits of each kind of quantizer, by run",
        reading="Mark: mean over the matrices of a run; thick line: from the first to the third quartile; thin line: "
        "narrowest and widest; dash: median.",
        label=f"Bit widths of {len(sites)} kinds of quantizer in {len(spreads)} runs on {tasks} tasks.",
        columns=COLUMNS,
        rows=_rows({name: runs[name] for name in spreads}),
        draw=partial(_draw_runs, spreads, sites),
    )


def _rows(runs: Runs) -> list[tuple[Cell, ...]]:
    return [
        (name, record.data.task, module.name, module.layer, module.kind, SITE_LABELS[site], bits)
        for name, record in runs.items()
        for module in record.modules
        for site, bits in module.bits.items()
    ]


def _spread(record: RunRecord) -> _Spread:
    """The widths at each site that has any, in ascending order."""
    found = {site: sorted(m.bits[site] for m in record.modules if site in m.bits) for site in SITES}
    return {site: bits for site, bits in found.items() if bits}


def _draw_boxes(spread: _Spread) -> Drawing:
    width = 0.7 + 0.53 * len(spread)
    drawing = sheet(width, 2.9)
    axes = place(drawing, 0.6, 0.35, width - 0.7, 2.27)
    line = {"color": INK, "alpha": 0.45, "linewidth": 1.0}
    axes.boxplot(
        [[math.log2(bits) for bits in values] for values in spread.values()],
        positions=range(len(spread)),
        widths=0.7,
        showfliers=False,
        showcaps=False,
        whis=0,
        boxprops=line,
        medianprops=line | {"linewidth": 2.0},
        manage_ticks=False,
    )
    for column, values in enumerate(spread.values()):
        _draw_dots(axes, column, values)
    _bit_axis(axes, list(spread))
    return drawing


def _draw_dots(axes: Axes, column: int, values: Sequence[int]) -> None:
    """One dot a matrix, side by side where widths are equal, and the mean as a number above the column."""
    across: list[float] = []
    for bits in sorted(set(values)):
        count = values.count(bits)
        step = min(0.1, 0.66 / count)
        across += [column + step * (index - (count - 1) / 2) for index in range(count)]
    axes.scatter(across, [math.log2(bits) for bits in values], s=12, color=BLUE, linewidths=0, zorder=3)
    mean = sum(values) / len(values)
    axes.scatter([column], [math.log2(mean)], s=40, marker="D", color=VERMILION, linewidths=0, zorder=4)
    axes.annotate(
        f"{mean:.1f}", (column, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
        ha="center", color=INK, fontsize=9,
    )  # fmt: skip


def _draw_runs(spreads: dict[str, _Spread], sites: list[Site]) -> Drawing:
    keys = marked(spreads)
    apart = max(0.11, min(0.2, 9.4 / len(sites) / (len(spreads) + 1.5)))
    group = apart * (len(spreads) + 1.5)
    width = 0.7 + group * len(sites)
    below = legend_height(keys, width)
    drawing = sheet(width, 2.65 + below)
    axes = place(drawing, 0.6, 0.35 + below, width - 0.7, 2.2)
    for number, (spread, key) in enumerate(zip(spreads.values(), keys, strict=True)):
        for column, site in enumerate(sites):
            if site in spread:
                x = column + (number - (len(spreads) - 1) / 2) * apart / group
                _draw_spread(axes, x, spread[site], key)
    for edge in range(1, len(sites)):
        axes.axvline(edge - 0.5, color=INK, alpha=0.18, linewidth=0.8)
    _bit_axis(axes, sites)
    draw_legend(drawing, keys)
    return drawing


def _draw_spread(axes: Axes, x: float, values: list[int], key: Key) -> None:
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    ends, box = [math.log2(values[0]), math.log2(values[-1])], [math.log2(low), math.log2(high)]
    axes.plot([x, x], ends, color=key.colour, linewidth=0.9)
    axes.plot([x, x], box, color=key.colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
    axes.plot([x], [math.log2(middle)], color=INK, marker="_", markersize=8, markeredgewidth=1.2)
    mean = math.log2(sum(values) / len(values))
    axes.plot(
        [x], [mean], color=key.colour, marker=key.marker, markersize=6.5, markeredgecolor=INK, markeredgewidth=0.7
    )


def _bit_axis(axes: Axes, sites: Sequence[Site]) -> None:
    axes.set_xticks(range(len(sites)), [SITE_LABELS[site] for site in sites])
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([math.log2(bits) for bits in _WIDTHS], [str(bits) for bits in _WIDTHS])
    axes.set(xlim=(-0.5, len(sites) - 0.5), ylim=(0.6, 5.4), ylabel="bits")
