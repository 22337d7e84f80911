"""Tables of numbers as coloured cells, several side by side on one colour scale, the numbers printed in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankbits.reports.figures.canvas import CHARACTER, PAGE_WIDTH, place, sheet, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

_CELL_HEIGHT = 0.27
_TITLE = 0.24
_GAP = 0.25


@dataclass(frozen=True)
class Grid:
    """A table of numbers; an absent cell stays empty. The title, if any, stands above its columns."""

    rows: list[str]
    columns: list[str]
    cells: dict[tuple[int, int], float]
    title: str = ""


@dataclass(frozen=True)
class _Measure:
    """Inches of one panel; panels of one figure are alike, so that equal things have equal places."""

    left: float
    right: float
    above: float
    cells_wide: float
    cells_high: float

    @property
    def width(self) -> float:
        return self.left + self.cells_wide + self.right

    @property
    def height(self) -> float:
        return self.above + self.cells_high + 0.05


def draw_grids(grids: list[Grid], shade: Callable[[float], float]) -> Drawing:
    """Draw grids beside each other, in as many lines as a page needs.

    Cells have one physical size: a large model makes a larger figure and never a smaller print.

    Args:
        grids: at least one; all with the same rows and columns if there are several.
        shade: where on the colour scale, 0 to 1, a number lies.
    """
    measure = _measured(grids)
    beside = min(len(grids), max(1, int((PAGE_WIDTH + _GAP) / (measure.width + _GAP))))
    lines = -(-len(grids) // beside)
    width = beside * (measure.width + _GAP) - _GAP
    height = lines * (measure.height + _GAP) - _GAP
    drawing = sheet(width, height)
    for index, grid in enumerate(grids):
        line, column = divmod(index, beside)
        left = column * (measure.width + _GAP) + measure.left
        bottom = height - line * (measure.height + _GAP) - measure.above - measure.cells_high
        axes = place(drawing, left, bottom, measure.cells_wide, measure.cells_high)
        _draw_grid(axes, grid, shade)
        if grid.title:
            x, y = (left - measure.left + 0.05) / width, (bottom + measure.cells_high + measure.above - 0.05) / height
            drawing.text(x, y, grid.title, va="top", fontweight="bold")
    return drawing


def _measured(grids: list[Grid]) -> _Measure:
    columns = grids[0].columns
    longest = max(len(text) for text in columns)
    cell = 0.5 if _slanted(columns) else max(0.5, longest * CHARACTER + 0.08)
    left = text_width(grids[0].rows) + 0.15
    names = longest * CHARACTER * 0.72 + 0.25 if _slanted(columns) else 0.3
    right = names * 0.9 if _slanted(columns) else 0.05
    title = max((len(grid.title) for grid in grids), default=0)
    # A title may be longer than its panel is wide; bold letters are wider, too.
    right = max(right, title * CHARACTER * 1.15 - left - cell * len(columns))
    above = names + (_TITLE if title else 0.0)
    return _Measure(left, right, above, cell * len(columns), _CELL_HEIGHT * len(grids[0].rows))


def _slanted(columns: list[str]) -> bool:
    return max(len(text) for text in columns) > 8


def _draw_grid(axes: Axes, grid: Grid, shade: Callable[[float], float]) -> None:
    _draw_cells(axes, grid, shade)
    axes.set(xlim=(-0.5, len(grid.columns) - 0.5), ylim=(len(grid.rows) - 0.5, -0.5))
    axes.set_yticks(range(len(grid.rows)), grid.rows)
    axes.set_xticks(range(len(grid.columns)), grid.columns)
    axes.tick_params(length=0, labelbottom=False, labeltop=True)
    if _slanted(grid.columns):
        for text in axes.get_xticklabels():
            text.set(rotation=40, ha="left", rotation_mode="anchor")
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_cells(axes: Axes, grid: Grid, shade: Callable[[float], float]) -> None:
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
