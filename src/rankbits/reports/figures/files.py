"""Figures as files: each as SVG, PNG and CSV of one name in one folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rankbits.errors import RunFolderError
from rankbits.records import write_atomically
from rankbits.reports.figures.canvas import file_png, file_svg
from rankbits.reports.figures.figure import Figure

SUFFIXES = (".svg", ".png", ".csv")


def write_figures(figures: Iterable[Figure], folder: Path) -> list[Path]:
    """Write `<name>.svg`, `.png` and `.csv` of each figure, over older ones, and return all paths.

    Other files in the folder stay. Raises RunFolderError if the folder or a file cannot be written, RankbitsError if
    the `report` extra is not installed.
    """
    written = []
    for figure in figures:
        svg, png, table = file_svg(figure), file_png(figure), figure.csv()
        paths = [folder / f"{figure.name}{suffix}" for suffix in SUFFIXES]
        _make(folder)
        write_atomically(paths[0], svg)
        write_atomically(paths[1], png)
        write_atomically(paths[2], table)
        written += paths
    return written


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be made ({error.strerror or error})") from error
