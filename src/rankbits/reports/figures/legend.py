"""Legends: names with their colour and mark, in lines below a drawing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankbits.reports.figures.canvas import DASHES, HATCHES, INK, LINE, MARKERS, PALETTE, place, text_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

_HANDLE = 0.5
_LINE = LINE * 1.3


@dataclass(frozen=True)
class Key:
    """One entry: a name, its colour, and what tells it apart without colour: a mark, dashes or a hatch.

    `size` is that of the mark, in points.
    """

    name: str
    colour: str
    marker: str = ""
    dashes: Any = ""
    hatch: str | None = None
    size: float = 6.0


def marked(names: Iterable[str]) -> list[Key]:
    """A colour and a marker for each name."""
    return [
        Key(name, PALETTE[number % len(PALETTE)], marker=MARKERS[number % len(MARKERS)])
        for number, name in enumerate(names)
    ]


def dashed(names: Iterable[str]) -> list[Key]:
    """A colour and dashes for each name."""
    return [
        Key(name, PALETTE[number % len(PALETTE)], dashes=DASHES[number % len(DASHES)])
        for number, name in enumerate(names)
    ]


def hatched(names: Iterable[str]) -> list[Key]:
    """A colour and a hatch for each name."""
    return [
        Key(name, PALETTE[number % len(PALETTE)], hatch=HATCHES[number % len(HATCHES)])
        for number, name in enumerate(names)
    ]


def legend_height(keys: list[Key], width: float) -> float:
    """Inches that the legend takes below a drawing `width` inches wide."""
    return len(_lines(keys, width)) * _LINE + 0.08


def draw_legend(drawing: Drawing, keys: list[Key], *, bottom: float = 0.0) -> None:
    """Draw the entries in lines from the left, the last of them `bottom` inches above the foot."""
    width = float(drawing.get_size_inches()[0])
    lines = _lines(keys, width)
    axes = place(drawing, 0, bottom, width, len(lines) * _LINE + 0.04)
    axes.set(xlim=(0, width), ylim=(0, len(lines) * _LINE + 0.04))
    axes.axis("off")
    for number, line in enumerate(lines):
        x, y = 0.1, (len(lines) - number - 0.5) * _LINE + 0.04
        for key in line:
            _draw_handle(axes, key, x, y)
            axes.text(x + _HANDLE - 0.1, y, key.name, va="center_baseline")
            x += _entry_width(keys)


def _lines(keys: list[Key], width: float) -> list[list[Key]]:
    in_line = max(1, int((width - 0.1) / _entry_width(keys)))
    return [keys[start : start + in_line] for start in range(0, len(keys), in_line)]


def _entry_width(keys: list[Key]) -> float:
    """Width in inches of every entry: that of the longest, so that entries stand in columns."""
    return _HANDLE + text_width([key.name for key in keys]) + 0.1


def _draw_handle(axes: Any, key: Key, x: float, y: float) -> None:
    from matplotlib.patches import Rectangle

    if key.hatch is not None:
        box = Rectangle((x, y - 0.055), 0.3, 0.11, facecolor=key.colour, edgecolor=INK, hatch=key.hatch, linewidth=0.6)
        axes.add_patch(box)
    else:
        axes.plot(
            [x, x + 0.3] if key.dashes else [x + 0.2],
            [y, y] if key.dashes else [y],
            color=key.colour, marker=key.marker, linestyle=key.dashes or "none", linewidth=1.8, markersize=key.size,
            markeredgewidth=0,
        )  # fmt: skip
