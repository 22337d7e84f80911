"""What a figure is: a name, a title, how to read it, its numbers as a table, and how it is drawn."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankbits.records import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

Cell = str | int | float | None
Runs = Mapping[str, RunRecord]
"""Records under the labels they are shown by, in the order they are shown."""


@dataclass(frozen=True)
class Figure:
    """One figure of a report.

    Args:
        name: stem of its files: lower-case words with hyphens.
        title: its heading.
        reading: how to read it, in one or two sentences.
        label: what it shows, for those who cannot see it.
        columns: names of the columns of its numbers.
        rows: its numbers, a row for each thing drawn; None where there is no number.
        draw: makes the drawing; to be called inside `canvas.style`.
    """

    name: str
    title: str
    reading: str
    label: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    draw: Callable[[], Drawing]

    def csv(self) -> str:
        """The numbers as comma-separated text with a header line; an absent number is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()
