"""Loss, learned bits and learned ranks over the steps of training, for one run or several."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rankbits.records import SITES, RunRecord
from rankbits.reports.figures.canvas import BLUE, GREEN, VERMILION, place, sheet
from rankbits.reports.figures.figure import Figure, Runs
from rankbits.reports.figures.legend import Key, dashed, draw_legend, legend_height
from rankbits.reports.tables import SITE_LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

COLUMNS = ("run", "step", "quantity", "value")
_PANELS = (("loss", "loss", BLUE), ("bits_mean", "mean bits", VERMILION), ("rank_mean", "mean rank", GREEN))
_SITE_KEYS = {f"bits_{site}": SITE_LABELS[site] for site in SITES}
_PANEL = 1.3
_Points = list[tuple[float, float]]


@dataclass(frozen=True)
class _Line:
    """One curve: a step and a value for each time it was logged."""

    run: str
    quantity: str
    points: _Points
    key: Key


def training(runs: Runs) -> Figure | None:
    """A panel for each quantity, a line for each kind of quantizer or each run; None if no two points were logged."""
    panels = _panels(runs)
    if not panels:
        return None
    lines = [line for _, drawn in panels for line in drawn]
    last = max(1.0, *(step for line in lines for step, _ in line.points))
    several = f" of {len(runs)} runs" if len(runs) > 1 else ""
    trends = ", ".join(_trend(title, drawn) for title, drawn in panels)
    return Figure(
        name="training",
        title="During training",
        reading="As logged, over optimizer steps. Bits and ranks are those of the gates as inference would set them.",
        label=f"Curves{several} over {last:.0f} optimizer steps: {trends}.",
        columns=COLUMNS,
        rows=[(line.run, step, line.quantity, value) for line in lines for step, value in line.points],
        draw=partial(_draw, panels, last),
    )


def _panels(runs: Runs) -> list[tuple[str, list[_Line]]]:
    """Titles with their lines. One run is drawn by kind of quantizer where that was logged; several by run."""
    keys = dashed(runs)
    panels = []
    for quantity, title, colour in _PANELS:
        lines = []
        for (name, record), key in zip(runs.items(), keys, strict=True):
            points = _points(record, quantity)
            one = Key("", colour, dashes="-") if len(runs) == 1 else key
            lines += [_Line(name, quantity, points, one)] if len(points) > 1 else []
        if quantity == "bits_mean" and len(runs) == 1:
            lines = _by_site(runs) or lines
        if lines:
            panels.append((title, lines))
    return panels


def _by_site(runs: Runs) -> list[_Line]:
    ((name, record),) = runs.items()
    found = {quantity: _points(record, quantity) for quantity in _SITE_KEYS}
    drawn = {quantity: points for quantity, points in found.items() if len(points) > 1}
    keys = dashed(_SITE_KEYS[quantity] for quantity in drawn)
    return [_Line(name, quantity, points, key) for (quantity, points), key in zip(drawn.items(), keys, strict=True)]


def _points(record: RunRecord, quantity: str) -> _Points:
    return [(row["step"], row[quantity]) for row in record.history if "step" in row and quantity in row]


def _trend(title: str, lines: list[_Line]) -> str:
    first, last = ({line.points[place][1] for line in lines} for place in (0, -1))
    return f"{title} from {_range(first)} to {_range(last)}"


def _range(values: set[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}–{high}"


def _draw(panels: list[tuple[str, list[_Line]]], last: float) -> Drawing:
    keys = list(dict.fromkeys(line.key for _, lines in panels for line in lines if line.key.name))
    width = 4.6
    below = legend_height(keys, width) if keys else 0.0
    height = 0.55 + _PANEL * len(panels) + below
    drawing = sheet(width, height)
    for index, (title, lines) in enumerate(panels):
        axes = place(drawing, 0.6, height - 0.1 - _PANEL * (index + 1) + 0.12, width - 0.75, _PANEL - 0.22)
        _draw_panel(axes, lines)
        axes.set(xlim=(0, last), ylabel=title)
        axes.tick_params(labelbottom=index == len(panels) - 1)
    drawing.axes[-1].set_xlabel("optimizer step")
    if keys:
        draw_legend(drawing, keys)
    return drawing


def _draw_panel(axes: Axes, lines: list[_Line]) -> None:
    for line in lines:
        steps, values = zip(*line.points, strict=True)
        axes.plot(steps, values, color=line.key.colour, linestyle=line.key.dashes, linewidth=1.8)
    axes.margins(y=0.12)
    axes.locator_params(axis="y", nbins=4)
