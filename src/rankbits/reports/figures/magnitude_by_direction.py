"""Change of magnitude against change of direction of weights: a panel for each method (DoRA, figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import StatisticsError, correlation, linear_regression
from typing import TYPE_CHECKING

from rankbits.records import WeightChangeRecord
from rankbits.reports.figures.canvas import INK, PAGE_WIDTH, place, sheet
from rankbits.reports.figures.figure import Figure
from rankbits.reports.figures.legend import Key, draw_legend, legend_height, marked

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

COLUMNS = ("method", "layer", "step", "magnitude", "direction")
_LEFT = 0.85
_AXES = 2.15
_HIGH = 1.9
_ABOVE = 0.3
_BELOW = 0.52
_RIGHT = 0.2
_SMALLEST, _LARGEST = 3.5, 7.5
_LIGHTEST = 0.88
"""Where the scale of colours ends: beyond it, it is lost on white."""


@dataclass(frozen=True)
class _Panel:
    """What one method did to the matrices of one kind."""

    method: str
    kind: str
    points: list[WeightChangeRecord]

    @property
    def across(self) -> list[float]:
        return [point.direction for point in self.points]

    @property
    def upwards(self) -> list[float]:
        return [point.magnitude for point in self.points]

    @property
    def correlation(self) -> str:
        """Pearson's, signed; empty where it has none: of one point, or of points that do not differ."""
        try:
            return f"{correlation(self.across, self.upwards):+.2f}"
        except StatisticsError:
            return ""


def magnitude_by_direction(points: Sequence[WeightChangeRecord]) -> Figure:
    """The scatter plot of what was measured during training, a panel for each method and kind of matrix.

    Args:
        points: of all methods, as `WeightChangeCallback` collects them.

    Raises:
        ValueError: there are none.
    """
    if not points:
        raise ValueError("no points to draw: expected at least one WeightChangeRecord")
    kinds = dict.fromkeys(point.kind for point in points)
    methods = list(dict.fromkeys(point.method for point in points))
    panels = [
        _Panel(method, kind, found)
        for kind in kinds
        for method in methods
        if (found := [point for point in points if (point.method, point.kind) == (method, kind)])
    ]
    steps = sorted({point.step for point in points})
    layers = len({point.layer for point in points})
    correlations = ", ".join(f"{panel.method} {panel.kind} {panel.correlation or 'none'}" for panel in panels)
    return Figure(
        name="magnitude-by-direction",
        title="Change of magnitude and direction",
        reading="A mark is one matrix at one checkpoint: right, how far its rows turned; up, how far their norms "
        "moved. Number and line: correlation and least squares over a panel. Each panel has its own scales.",
        label=f"Change of magnitude against change of direction of {layers} matrices at {len(steps)} checkpoints. "
        f"Correlations: {correlations}.",
        columns=COLUMNS,
        rows=[(point.method, point.layer, point.step, point.magnitude, point.direction) for point in points],
        draw=partial(_draw, panels, methods, steps),
    )


def _draw(panels: list[_Panel], methods: list[str], steps: list[int]) -> Drawing:
    across, step = _LEFT + _AXES + _RIGHT, _ABOVE + _HIGH + _BELOW
    beside = min(len(methods), int(PAGE_WIDTH / across))
    rows = -(-len(panels) // beside)
    keys = _step_keys(steps)
    below = legend_height(keys, beside * across)
    drawing = sheet(beside * across, rows * step + below)
    markers = {key.name: key.marker for key in marked(methods)}
    for index, panel in enumerate(panels):
        row, column = divmod(index, beside)
        bottom = below + (rows - 1 - row) * step + _BELOW
        axes = place(drawing, column * across + _LEFT, bottom, _AXES, _HIGH)
        _draw_panel(axes, panel, dict(zip(steps, keys, strict=True)), markers[panel.method])
    draw_legend(drawing, keys)
    return drawing


def _step_keys(steps: list[int]) -> list[Key]:
    """The later a checkpoint, the lighter and the larger its marks."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shares = [index / max(1, len(steps) - 1) for index in range(len(steps))]
    return [
        Key(
            f"step {step}",
            to_hex(colormaps["viridis"](share * _LIGHTEST)),
            marker="o",
            size=_SMALLEST + share * (_LARGEST - _SMALLEST),
        )
        for step, share in zip(steps, shares, strict=True)
    ]


def _draw_panel(axes: Axes, panel: _Panel, keys: dict[int, Key], marker: str) -> None:
    for step, key in keys.items():
        # The smaller marks of early checkpoints lie on the larger ones of late checkpoints, so that both are seen.
        held = [point for point in panel.points if point.step == step]
        axes.plot(
            [point.direction for point in held], [point.magnitude for point in held], color=key.colour, marker=marker,
            markersize=key.size, linestyle="none", markeredgewidth=0, alpha=0.85,
            zorder=10 - key.size,
        )  # fmt: skip
    if panel.correlation:
        slope, start = linear_regression(panel.across, panel.upwards)
        ends = [min(panel.across), max(panel.across)]
        axes.plot(ends, [start + slope * end for end in ends], color=INK, alpha=0.55, linewidth=1.0)
        axes.set_title(f"correlation {panel.correlation}", loc="right")
    axes.set_title(f"{panel.method}, {panel.kind}", loc="left", fontweight="bold")
    axes.set(xlabel="ΔD, change of direction", ylabel="ΔM, change of magnitude")
    axes.margins(0.08)
    axes.locator_params(nbins=4)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x")
