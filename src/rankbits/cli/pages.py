"""The page of one or several runs, its figures as files beside it, and a link from each run to its recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankbits.records import RunRecord

_RECIPE_FILES = ("recipe.yaml", "record.json")
_FIGURES = "figures"


def write_page(runs: Sequence[tuple[RunRecord, Path]], page: Path, figures: Path | None = None) -> Path:
    """Render records, each with the folder it lies in, to one page, and its figures as files that the page links to.

    Args:
        runs: at least one.
        page: where the page goes; its folder exists.
        figures: the folder of the figures; by default `figures` beside the page.

    Returns:
        The folder of the figures, which is not made if there is nothing to draw.

    Raises:
        RankbitsError: page or figures cannot be drawn here, or not be written.
    """
    from rankbits.reports.figures import report_figures
    from rankbits.reports.figures.files import write_figures
    from rankbits.reports.html import render

    records = [record for record, _ in runs]
    folder = figures or page.parent / _FIGURES
    write_figures(report_figures(records).all(), folder)
    links = {record.recipe_hash: recipe_link(folder, page) for record, folder in runs}
    render(records, page, links, Path(os.path.relpath(folder, page.parent)).as_posix())
    return folder


def recipe_link(folder: Path, page: Path) -> str:
    """A relative link from the page to the recipe of a run: its recipe.yaml, else the record, which holds it too."""
    held = [name for name in _RECIPE_FILES if (folder / name).exists()]
    target = folder / (held[0] if held else _RECIPE_FILES[-1])
    return Path(os.path.relpath(target, page.parent)).as_posix()
