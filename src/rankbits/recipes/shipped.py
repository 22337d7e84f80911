"""The recipes that come with the package, and finding one by name or by path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rankbits.errors import RecipeError
from rankbits.recipes.nearest import nearest

FOLDER = Path(__file__).parent / "library"


@dataclass(frozen=True)
class RecipeFile:
    """Where a recipe is written, the name it has by itself, and how messages call it."""

    path: Path
    name: str
    label: str


def names() -> list[str]:
    """Names of the shipped recipes that can be run, sorted: their path in the library without .yaml."""
    return [name for name in _all_names() if not is_base(name)]


def bases() -> list[str]:
    """Names of the shipped recipes that others extend and that cannot be run by themselves."""
    return [name for name in _all_names() if is_base(name)]


def is_base(name: str) -> bool:
    """Whether a shipped name says that the recipe is only there to be extended."""
    return name.rpartition("/")[2].startswith("base-")


def find(recipe: str, beside: Path | None = None) -> RecipeFile:
    """The file of a recipe: a shipped name, else a path (relative to the folder `beside`, if given).

    Raises:
        RecipeError: there is neither; the message names the nearest shipped recipes.
    """
    name = recipe.removesuffix(".yaml")
    if name in _all_names():
        return RecipeFile(FOLDER / f"{name}.yaml", name, name)
    path = Path(recipe) if beside is None else beside / recipe
    if path.is_file():
        return RecipeFile(path, _name_of(path), recipe)
    what = "a folder" if path.is_dir() else "neither a shipped recipe nor a file"
    close = nearest(name, _all_names(), count=3)
    hint = f"nearest shipped: {', '.join(close)}" if close else "`rankbits list recipes` shows the shipped ones"
    raise RecipeError(f"no recipe {recipe!r}: it is {what}; {hint}")


def _all_names() -> list[str]:
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def _name_of(path: Path) -> str:
    # A name becomes a folder: what a file name may hold and a recipe's name may not is replaced.
    return re.sub(r"[^\w.-]+", "-", path.stem).lstrip(".-") or "recipe"
