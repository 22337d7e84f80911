"""Where the cost is: MACs and bit operations by kind of product, a bar for each run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from rankbits.records import CostRecord
from rankbits.reports.costs import Part, breakdown, comparison_notes, module_kind, si
from rankbits.reports.figures.canvas import INK, LINE, note, note_lines, place, sheet, text_width
from rankbits.reports.figures.figure import Cell, Figure, Runs
from rankbits.reports.figures.legend import Key, draw_legend, hatched, legend_height

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

COLUMNS = ("run", "op", "module", "products", "macs", "integer_macs", "bops_nominal", "bops_executable")
_PANELS = (("MACs", "macs"), ("nominal BOPs", "bops"), ("executable BOPs", "executable_bops"))
_PANEL = 2.3
_ROOM_FOR_NUMBER = 0.72
_BAR = 0.17
_SEPARATOR = "\0"


def cost_by_product(runs: Runs) -> Figure | None:
    """Sums of MACs and bit operations over the products of one kind; None if no run was counted."""
    counted = {name: r.costs for name, r in runs.items() if r.costs is not None and r.costs.products}
    if not counted:
        return None
    parts = {name: {part.name: part for part in breakdown(costs, lambda p: p.op)} for name, costs in counted.items()}
    ops = list(dict.fromkeys(op for by_op in parts.values() for op in by_op))
    totals = {op: sum(by_op[op].macs for by_op in parts.values() if op in by_op) for op in ops}
    ops.sort(key=lambda op: -totals[op])
    several = f"{len(counted)} runs" if len(counted) > 1 else "one run"
    return Figure(
        name="cost-by-product",
        title="Cost by kind of product",
        reading="Sums over all products of a kind: multiply-accumulates, bit operations at nominal widths, and at the "
        "widths of the kernels that can run them.",
        label=f"Bars of MACs, nominal and executable bit operations by {len(ops)} kinds of matrix product, for "
        f"{several}.",
        columns=COLUMNS,
        rows=[row for name, costs in counted.items() for row in _rows(name, costs)],
        draw=partial(_draw, parts, ops, comparison_notes(counted)[1:]),
    )


def _rows(name: str, costs: CostRecord) -> list[tuple[Cell, ...]]:
    parts = breakdown(costs, lambda product: f"{product.op}{_SEPARATOR}{module_kind(product)}")
    return [
        (
            name,
            *part.name.split(_SEPARATOR),
            part.products,
            part.macs,
            part.integer_macs,
            part.bops,
            part.executable_bops,
        )
        for part in parts
    ]


def _draw(parts: dict[str, dict[str, Part]], ops: list[str], notes: list[str]) -> Drawing:
    keys = hatched(parts)
    left = text_width(ops) + 0.2
    width = left + len(_PANELS) * (_PANEL + 0.12)
    lines = [line for text in notes for line in note_lines(text, width)]
    foot = len(lines) * LINE * 0.92 + 0.15
    legend = legend_height(keys, width) if len(keys) > 1 else 0.0
    high = len(ops) * (_BAR * len(keys) + 0.14)
    drawing = sheet(width, 0.35 + high + legend + foot)
    for column, (title, amount) in enumerate(_PANELS):
        axes = place(drawing, left + column * (_PANEL + 0.12), foot + legend, _PANEL, high)
        _draw_bars(axes, [{op: getattr(p, amount) for op, p in by_op.items()} for by_op in parts.values()], ops, keys)
        axes.set_title(title, loc="left", fontweight="bold")
        if column:
            axes.set_yticklabels([])
    if len(keys) > 1:
        draw_legend(drawing, keys, bottom=foot)
    note(drawing, "\n".join(lines))
    return drawing


def _draw_bars(axes: Axes, amounts: list[dict[str, int]], ops: list[str], keys: list[Key]) -> None:
    """Bars from zero with their numbers; the group of an op holds a bar for each run, the first on top."""
    most = max(max(by_op.values()) for by_op in amounts)
    group = _BAR * len(keys) + 0.14
    thick = _BAR / group
    for number, (by_op, key) in enumerate(zip(amounts, keys, strict=True)):
        for row, op in enumerate(ops):
            y = row + (number - (len(keys) - 1) / 2) * thick
            if op not in by_op:
                continue
            share = by_op[op] / most * (1 - _ROOM_FOR_NUMBER / _PANEL)
            axes.barh(y, share, height=0.86 * thick, color=key.colour, edgecolor=INK, hatch=key.hatch, linewidth=0.6)
            axes.text(share + 0.015, y, si(by_op[op]), va="center_baseline", fontsize=8)
    axes.set(xlim=(0, 1), ylim=(len(ops) - 0.5, -0.5), xticks=[])
    axes.set_yticks(range(len(ops)), ops)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
