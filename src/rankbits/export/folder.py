"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankbits.errors import ExportError


def refuse_taken(path: Path) -> None:
    """Raise ExportError if a path is anything else than free or an empty folder."""
    if path.is_symlink() or path.exists():
        if not path.is_dir():
            raise ExportError(f"{path} exists and is no folder: choose a new or empty folder")
        if any(path.iterdir()):
            raise ExportError(f"{path} exists and is not empty: choose a new or empty folder, nothing is overwritten")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that takes its place at the end of the block.

    If the block fails, the folder is removed, and so are folders above `path` that were made for it.
    """
    path = path.absolute()
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    complete = False
    try:
        draft.mkdir()
        yield draft
        if path.is_dir():
            path.rmdir()
        draft.replace(path)
        complete = True
    finally:
        if not complete:
            shutil.rmtree(draft, ignore_errors=True)
            for parent in made:
                parent.rmdir()
