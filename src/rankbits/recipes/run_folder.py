"""The folder of one run: which recipe it belongs to, how far it came, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rankbits.errors import RunFolderError
from rankbits.recipes.catalogue import METHODS, method
from rankbits.recipes.schema import Recipe
from rankbits.records import RunRecord, recipe_hash, write_atomically

RECIPE_FILE = "recipe.yaml"
RECORD_FILE = "record.json"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"
CHECKPOINT_FOLDER = "checkpoints"
NOT_PART_OF_THE_WORK = {"output": True, "training": {"report_to", "logging_steps", "save_steps"}}
"""Keys that change where results go or how often they are told, and so neither the hash nor whether a run resumes."""

LATER_KEYS = (
    ("task", "start_at_mean"),
    ("adapter", "rounding"),
    ("adapter", "code_range"),
    ("adapter", "scale_bits"),
    ("adapter", "activation_ranges"),
    ("adapter", "input_granularity"),
)
"""Keys that are part of the work only where they are not at their default: older runs keep their hashes."""

METHOD_SECTIONS = frozenset(section for known in METHODS for section in known.sections)
"""Sections of `adapter` that hold the settings of some methods only."""


def work_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, without what does not change the result: settings of other methods do not either."""
    of_others = METHOD_SECTIONS - set(method(recipe.method).sections)
    left_out: Any = {**NOT_PART_OF_THE_WORK, "adapter": of_others}
    work = recipe.model_dump(mode="json", exclude=left_out)
    for section, key in LATER_KEYS:
        if getattr(getattr(recipe, section), key) == type(getattr(recipe, section)).model_fields[key].default:
            del work[section][key]
    return work


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its files.

    Args:
        path: the folder.
        recipe: what is run in it.
    """

    path: Path
    recipe: Recipe

    @property
    def adapter(self) -> Path:
        """The finished adapter, as PEFT saves it."""
        return self.path / ADAPTER_FOLDER

    @property
    def model(self) -> Path:
        """The finished model, as transformers saves it, where weights of its own were trained."""
        return self.path / MODEL_FOLDER

    @property
    def checkpoints(self) -> Path:
        """The Trainer's checkpoints."""
        return self.path / CHECKPOINT_FOLDER

    def inspect(self) -> RunRecord | None:
        """Find what was done in the folder, without touching it.

        Returns:
            The record if this recipe has finished here, else None: the run is new, or to be resumed.

        Raises:
            RunFolderError: the folder holds the run of another recipe, or other files.
        """
        kept = self.path / RECIPE_FILE
        if kept.is_file():
            self._check_same(read_recipe(kept))
            record = self.path / RECORD_FILE
            return RunRecord.read(record) if record.is_file() else None
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunFolderError(
                f"output: {self.path} exists and holds no rankbits run; choose an empty or new folder with output=..."
            )
        return None

    def claim(self) -> None:
        """Make the folder this recipe's, once everything else is known to be in order.

        Raises:
            RunFolderError: it cannot be written.
        """
        if (self.path / RECIPE_FILE).is_file():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            raise RunFolderError(f"output: {self.path} cannot be created ({reason.strerror or reason})") from reason
        text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(self.path / RECIPE_FILE, text)

    def _check_same(self, kept: Recipe) -> None:
        mine, theirs = work_of(self.recipe), work_of(kept)
        if recipe_hash(mine) == recipe_hash(theirs):
            return
        changed = ", ".join(_differences(mine, theirs))
        raise RunFolderError(
            f"output: {self.path} holds another run (recipe {kept.name!r}), which differs in {changed}; choose another "
            "folder with output=..., or delete that one"
        )

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        steps = sorted(
            (int(folder.name.rsplit("-", 1)[1]), folder)
            for folder in self.checkpoints.glob("checkpoint-*")
            if folder.name.rsplit("-", 1)[1].isdigit() and (folder / "trainer_state.json").is_file()
        )
        return steps[-1][1] if steps else None


def read_recipe(path: Path) -> Recipe:
    """The recipe that a run folder keeps. RunFolderError if it is not one."""
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as reason:
        raise RunFolderError(f"{path} is not the recipe of a run: {reason}") from reason


def _differences(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({b!r} there, {a!r} here)")
    return found
