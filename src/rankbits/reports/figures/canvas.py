"""Where figures are drawn: one style, sizes in inches, and the ways out: SVG for a page, SVG and PNG as files."""

from __future__ import annotations

import hashlib
import html
import io
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rankbits.reports.extra import require_report_extra
from rankbits.reports.figures.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

INK = "#0b0c0d"
"""Near black in files. On a page it stands for the colour of the text, so no palette may contain it."""
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
PALETTE = (BLUE, VERMILION, GREEN, "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito (2008) without black, which is our ink, and yellow, which is lost on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "||||", "----")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
"""Markers, hatches and dashes tell apart in print what colours do on a screen. Their numbers share no divisor with that
of the colours, so that pairs repeat late."""
CHARACTER = 0.082
"""Width in inches of a character of 9 points."""
LINE = 0.16
"""Height in inches of a line of 9 points."""
PAGE_WIDTH = 10.4
"""Widest drawing, in inches, that a desktop page shows in full size."""
SMALLEST = 0.72
"""A page shrinks a drawing to this part of its size; where that does not fit either, it scrolls."""
_DOTS_PER_INCH = 200
_LONGEST_PIXELS = 20_000


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's own defaults plus ours, whatever the user's matplotlibrc says, put back afterwards.

    Raises RankbitsError if the `report` extra is not installed.
    """
    require_report_extra()
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        # A name in a script that our font lacks is shown by the reader's font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "rankbits",
                "text.parse_math": False,
                "font.family": "sans-serif",
                "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
                "font.size": 9,
                "axes.labelsize": 9,
                "axes.titlesize": 9,
                "axes.facecolor": "none",
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.grid": True,
                "axes.grid.axis": "y",
                "grid.alpha": 0.18,
                "hatch.linewidth": 0.6,
                "legend.frameon": False,
                "legend.fontsize": 9,
                **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color"), INK),
                **dict.fromkeys(("xtick.color", "ytick.color", "hatch.color"), INK),
            }
        )
        yield


def sheet(width: float, height: float) -> Drawing:
    """An empty drawing, its size in inches."""
    from matplotlib.figure import Figure as Drawing

    return Drawing(figsize=(width, height))


def place(drawing: Drawing, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes with the given lower left corner and size, in inches."""
    across, along = drawing.get_size_inches()
    return drawing.add_axes((left / across, bottom / along, width / across, height / along))


def note(drawing: Drawing, text: str, *, left: float = 0.1, bottom: float = 0.06) -> None:
    """Small text at the foot of a drawing, already broken into lines by `note_lines`."""
    across, along = drawing.get_size_inches()
    drawing.text(left / across, bottom / along, text, fontsize=8, va="bottom", linespacing=1.25)


def note_lines(text: str, width: float) -> list[str]:
    """The lines of a note below a drawing `width` inches wide."""
    return textwrap.wrap(text, max(24, int((width - 0.2) / (CHARACTER * 0.8))))


def text_width(texts: list[str]) -> float:
    """Inches that the longest of some texts takes."""
    return max((len(text) for text in texts), default=0) * CHARACTER


def page_svg(figure: Figure) -> str:
    """The figure as part of a page: it takes its ink and background from there, so it serves light and dark.

    The same text for the same figure: no date, no creator, ids from a fixed salt and only those that are used.
    """
    text = _named(_svg_text(figure, transparent=True).replace(INK, "currentColor"), figure)
    # Several figures share a page, and with it one space of ids.
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'(\bid="|url\(#|href="#)([\w.-]+)', rf"\g<1>f{own}-\g<2>", text)
    smallest = SMALLEST * float(re.search(r'<svg [^>]*?width="([\d.]+)pt"', text)[1])  # type: ignore[index]
    return text.replace("<svg ", f'<svg style="min-width: {smallest:.0f}pt" ', 1)


def file_svg(figure: Figure) -> str:
    """The figure as a file of its own: dark ink on white."""
    text = _named(_svg_text(figure, transparent=False), figure)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}'


def file_png(figure: Figure) -> bytes:
    """The figure as pixels on white, 200 to an inch (fewer where a figure is more than 100 inches long)."""
    with style():
        drawing = figure.draw()
        dots = min(_DOTS_PER_INCH, int(_LONGEST_PIXELS / max(drawing.get_size_inches())))
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="png", dpi=dots, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _svg_text(figure: Figure, *, transparent: bool) -> str:
    with style():
        buffer = io.StringIO()
        figure.draw().savefig(
            buffer, format="svg", transparent=transparent, facecolor="none" if transparent else "white"
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style[^>]*>.*?</style>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = {name for pair in re.findall(r'url\(#([\w.-]+)\)|href="#([\w.-]+)"', text) for name in pair}
    return re.sub(r' id="([^"]*)"', lambda match: match.group() if match.group(1) in used else "", text)


def _named(text: str, figure: Figure) -> str:
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(figure.label)}" ', 1)
