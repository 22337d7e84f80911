"""Figures as SVG text that takes its ink from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankbits.errors import RankbitsError
from rankbits.records import SITES, ModuleRecord, RunRecord
from rankbits.reports.extra import require_report_extra
from rankbits.reports.tables import SITE_LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stands for the page's text colour while matplotlib draws; no palette below contains it.
_INK = "#0b0c0d"
_BLUE, _VERMILION, _GREEN = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito 2008
_CURVES = (("loss", "loss", _BLUE), ("bits_mean", "mean bits", _VERMILION), ("rank_mean", "mean rank", _GREEN))
_WIDTHS = (2, 4, 8, 16, 32)
_CHARACTER = 0.082  # inches, of the 9 point labels
_CELL_HEIGHT = 0.27


@dataclass(frozen=True)
class _Grid:
    """A table of numbers to be drawn as coloured cells; an absent cell stays empty."""

    rows: list[str]
    columns: list[str]
    cells: dict[tuple[int, int], float]


def rank_heatmap(record: RunRecord) -> str:
    """Ranks over layers (rows) and kinds of matrix (columns), as SVG. RankbitsError if no matrix was adapted."""
    if not record.modules:
        raise RankbitsError(f"run {record.name!r} adapted no matrix: there are no ranks to draw")
    grid = _mean_by_place(record.modules)
    top = max(1, *(module.max_rank for module in record.modules))
    ranks = [module.rank for module in record.modules]
    label = (
        f"Heat map of ranks: {len(grid.rows)} layers by {len(grid.columns)} kinds of matrix, "
        f"from {min(ranks)} to {max(ranks)} of at most {top}."
    )
    return _heatmap(grid, lambda rank: rank / top, label)


def bits_heatmap(record: RunRecord) -> str:
    """Widths in bits over matrices (rows) and quantizers (columns), as SVG. RankbitsError if nothing was quantized."""
    modules = _quantized(record)
    sites = [site for site in SITES if any(site in module.bits for module in modules)]
    cells = {
        (row, column): float(module.bits[site])
        for row, module in enumerate(modules)
        for column, site in enumerate(sites)
        if site in module.bits
    }
    grid = _Grid(_module_labels(modules), [SITE_LABELS[site] for site in sites], cells)
    label = (
        f"Heat map of bit widths: {len(grid.rows)} matrices by {len(sites)} quantizers, "
        f"from {min(cells.values()):.0f} to {max(cells.values()):.0f} bits."
    )
    return _heatmap(grid, lambda bits: (math.log2(bits) - 1) / 4, label)


def bits_box(record: RunRecord) -> str:
    """How the widths of each kind of quantizer spread: box, one dot a matrix, mean. RankbitsError if none."""
    modules = _quantized(record)
    sites = [site for site in SITES if any(site in module.bits for module in modules)]
    spread = [sorted(module.bits[site] for module in modules if site in module.bits) for site in sites]
    means = ", ".join(f"{SITE_LABELS[s]} {sum(b) / len(b):.1f}" for s, b in zip(sites, spread, strict=True))
    with _style():
        figure = _figure(0.7 + 0.53 * len(sites), 2.9)
        axes = _axes(figure, left=0.6, bottom=0.35, right=0.1, top=0.28)
        _draw_boxes(axes, spread)
        _draw_dots(axes, spread)
        axes.set_xticks(range(len(sites)), [SITE_LABELS[site] for site in sites], parse_math=False)
        axes.set_yticks([math.log2(bits) for bits in _WIDTHS], [str(bits) for bits in _WIDTHS])
        axes.set(xlim=(-0.5, len(sites) - 0.5), ylim=(0.6, 5.4), ylabel="bits")
        return _svg(figure, f"Spread of bit widths over matrices, by quantizer. Means in bits: {means}.")


def has_curves(record: RunRecord) -> bool:
    """Whether the history holds at least two points of a curve that `training_curves` draws."""
    return bool(_curves(record))


def training_curves(record: RunRecord) -> str:
    """Loss, mean bits and mean rank over optimizer steps, one panel each, as SVG. RankbitsError if none was logged."""
    curves = _curves(record)
    if not curves:
        raise RankbitsError(f"run {record.name!r} logged no loss, bits or ranks: there are no curves to draw")
    with _style():
        height = 0.55 + 1.3 * len(curves)
        figure = _figure(4.6, height)
        last = max(step for _, _, points in curves for step, _ in points)
        for index, (title, colour, points) in enumerate(curves):
            bottom = height - 0.1 - 1.3 * (index + 1) + 0.12
            axes = _axes(figure, left=0.6, bottom=bottom, right=0.15, top=height - bottom - 1.08)
            axes.plot([step for step, _ in points], [value for _, value in points], color=colour, linewidth=1.8)
            axes.set(xlim=(0, last), ylabel=title)
            axes.margins(y=0.12)
            axes.locator_params(axis="y", nbins=4)
            axes.tick_params(labelbottom=index == len(curves) - 1)
        axes.set_xlabel("optimizer step")
        ends = ", ".join(f"{title} from {p[0][1]:.3g} to {p[-1][1]:.3g}" for title, _, p in curves)
        return _svg(figure, f"Curves over {last:.0f} optimizer steps: {ends}.")


def _curves(record: RunRecord) -> list[tuple[str, str, list[tuple[float, float]]]]:
    found = []
    for key, title, colour in _CURVES:
        points = [(row["step"], row[key]) for row in record.history if "step" in row and key in row]
        if len(points) > 1:
            found.append((title, colour, points))
    return found


def _quantized(record: RunRecord) -> list[ModuleRecord]:
    modules = [module for module in record.modules if module.bits]
    if not modules:
        raise RankbitsError(f"run {record.name!r} quantized nothing: there are no bits to draw")
    return sorted(modules, key=_layer_order)


def _layer_order(module: ModuleRecord) -> float:
    return math.inf if module.layer is None else module.layer


def _mean_by_place(modules: Sequence[ModuleRecord]) -> _Grid:
    """Modules laid out by layer and kind; where several share a place (experts, two towers), their mean rank."""
    layers = sorted({_layer_order(module) for module in modules})
    kinds = list(dict.fromkeys(module.kind for module in modules))
    ranks: dict[tuple[int, int], list[int]] = {}
    for module in modules:
        place = layers.index(_layer_order(module)), kinds.index(module.kind)
        ranks.setdefault(place, []).append(module.rank)
    rows = ["other" if layer == math.inf else f"layer {layer:.0f}" for layer in layers]
    return _Grid(rows, kinds, {place: sum(values) / len(values) for place, values in ranks.items()})


def _module_labels(modules: Sequence[ModuleRecord]) -> list[str]:
    short = [module.kind if module.layer is None else f"{module.layer}.{module.kind}" for module in modules]
    return [label if short.count(label) == 1 else module.name for label, module in zip(short, modules, strict=True)]


def _heatmap(grid: _Grid, shade: Callable[[float], float], label: str) -> str:
    """Draw cells of one physical size, so that a large model makes a larger figure and never a smaller print."""
    longest = max(len(text) for text in grid.columns)
    slanted = longest > 8
    cell_width = 0.5 if slanted else max(0.5, longest * _CHARACTER + 0.08)
    left = max(len(text) for text in grid.rows) * _CHARACTER + 0.15
    top = longest * _CHARACTER * 0.72 + 0.25 if slanted else 0.3
    right = top * 0.9 if slanted else 0.05
    with _style():
        figure = _figure(left + cell_width * len(grid.columns) + right, top + _CELL_HEIGHT * len(grid.rows) + 0.05)
        axes = _axes(figure, left=left, bottom=0.05, right=right, top=top)
        _draw_cells(axes, grid, shade)
        axes.set(xlim=(-0.5, len(grid.columns) - 0.5), ylim=(len(grid.rows) - 0.5, -0.5))
        axes.set_yticks(range(len(grid.rows)), grid.rows, parse_math=False)
        axes.set_xticks(range(len(grid.columns)), grid.columns, parse_math=False)
        axes.tick_params(length=0, labelbottom=False, labeltop=True)
        if slanted:
            for text in axes.get_xticklabels():
                text.set(rotation=40, ha="left", rotation_mode="anchor")
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _svg(figure, label)


def _draw_cells(axes: Axes, grid: _Grid, shade: Callable[[float], float]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    palette = colormaps["viridis"]
    for (row, column), value in sorted(grid.cells.items()):
        # The ends of viridis are cut off: almost-black and almost-white cells would sink into a dark or light page.
        red, green, blue, _ = palette(0.12 + 0.83 * min(1.0, max(0.0, shade(value))))
        axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=(red, green, blue), linewidth=0))
        text = f"{value:.0f}" if value == int(value) else f"{value:.1f}"
        print_colour = "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "#ffffff"
        axes.text(column, row, text, color=print_colour, ha="center", va="center", fontsize=9)


def _draw_boxes(axes: Axes, spread: Sequence[Sequence[int]]) -> None:
    line = {"color": _INK, "alpha": 0.45, "linewidth": 1.0}
    axes.boxplot(
        [[math.log2(bits) for bits in values] for values in spread],
        positions=range(len(spread)),
        widths=0.7,
        showfliers=False,
        showcaps=False,
        whis=0,
        boxprops=line,
        medianprops=line | {"linewidth": 2.0},
        manage_ticks=False,
    )


def _draw_dots(axes: Axes, spread: Sequence[Sequence[int]]) -> None:
    """One dot a matrix, side by side where widths are equal, and the mean as a number above each column."""
    for column, values in enumerate(spread):
        across: list[float] = []
        for bits in sorted(set(values)):
            count = values.count(bits)
            step = min(0.1, 0.66 / count)
            across += [column + step * (index - (count - 1) / 2) for index in range(count)]
        axes.scatter(across, [math.log2(bits) for bits in values], s=12, color=_BLUE, linewidths=0, zorder=3)
        mean = sum(values) / len(values)
        axes.scatter([column], [math.log2(mean)], s=40, marker="D", color=_VERMILION, linewidths=0, zorder=4)
        axes.annotate(
            f"{mean:.1f}", (column, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
            ha="center", color=_INK, fontsize=9,
        )  # fmt: skip


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's own defaults plus ours, whatever the user's matplotlibrc says, put back afterwards."""
    require_report_extra()
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "rankbits",
                "font.family": "DejaVu Sans",
                "font.size": 9,
                "axes.labelsize": 9,
                "axes.facecolor": "none",
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.grid.axis": "y",
                "grid.alpha": 0.18,
                **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color"), _INK),
                **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
            }
        )
        yield


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _axes(figure: Figure, *, left: float, bottom: float, right: float, top: float) -> Axes:
    """Axes with the given margins in inches."""
    width, height = figure.get_size_inches()
    across, along = (width - left - right) / width, (height - bottom - top) / height
    return figure.add_axes((left / width, bottom / height, across, along))


def _svg(figure: Figure, label: str) -> str:
    """The same text for the same figure: no date, no creator, ids from a fixed salt and only those that are used.

    `label` describes the figure in our own words and numbers: nothing that a record names may be in it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<style[^>]*>.*?</style>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'url\(#([\w.-]+)\)|href="#([\w.-]+)"', text))
    names = {name for pair in used for name in pair if name}
    text = re.sub(r' id="([^"]*)"', lambda match: match.group() if match.group(1) in names else "", text)
    # Several figures share a page, and with it one space of ids.
    own = hashlib.sha256((label + text).encode()).hexdigest()[:8]
    text = re.sub(r'(\bid="|url\(#|href="#)([\w.-]+)', rf"\g<1>f{own}-\g<2>", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
