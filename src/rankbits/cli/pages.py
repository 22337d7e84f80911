"""The page of one or several runs, with a link from each to its recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankbits.records import RunRecord

_RECIPE_FILES = ("recipe.yaml", "record.json")


def write_page(runs: Sequence[tuple[RunRecord, Path]], page: Path) -> None:
    """Render records, each with the folder it lies in, to one page.

    Raises:
        RankbitsError: the page cannot be drawn here, or not be written.
    """
    from rankbits.reports.html import render

    links = {record.recipe_hash: recipe_link(folder, page) for record, folder in runs}
    render([record for record, _ in runs], page, links)


def recipe_link(folder: Path, page: Path) -> str:
    """A relative link from the page to the recipe of a run: its recipe.yaml, else the record, which holds it too."""
    held = [name for name in _RECIPE_FILES if (folder / name).exists()]
    target = folder / (held[0] if held else _RECIPE_FILES[-1])
    return Path(os.path.relpath(target, page.parent)).as_posix()
