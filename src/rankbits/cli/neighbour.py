"""The stored LoRA result of the quickstart, shown beside a run only if both did the same work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankbits.records import RunRecord

SAME_WORK = ("task", "model", "training")
# These change what is kept and said on the way, not what is computed.
_NOT_WORK = ("training.save_steps", "training.logging_steps", "training.report_to")
_HOW_TO_MAKE = "`make baseline` makes it"


def find_neighbour(record: RunRecord, path: Path | None = None) -> tuple[RunRecord | None, str]:
    """The stored LoRA record to show beside `record`, or None, and one sentence for the user either way.

    Args:
        record: a finished quickstart.
        path: the stored record; by default the one that comes with the package.

    Raises:
        RecordError: something is stored but cannot be read.
    """
    from rankbits.recipes.shipped import FOLDER
    from rankbits.records import RunRecord

    stored = path or FOLDER / "quickstart.lora.json"
    if not stored.is_file():
        return None, f"plain LoRA's result on this work is not stored yet: {_HOW_TO_MAKE}"
    lora = RunRecord.read(stored)
    different = differences(_completed(record.recipe), _completed(lora.recipe))
    if different:
        listed = "; ".join(different)
        return None, f"plain LoRA's stored result is of other work ({listed}), so it is not shown: {_HOW_TO_MAKE} anew"
    return lora, f"lora: stored result of the same work, recipe {lora.recipe_hash[:12]}, seed {lora.seed}"


def differences(mine: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Where two recipes differ in task, model or training: "training.seed: 1 here, 42 there"."""
    here, there = _flat(mine), _flat(stored)
    return [
        f"{key}: {here.get(key)} here, {there.get(key)} there"
        for key in sorted(here.keys() | there.keys())
        if key not in _NOT_WORK and here.get(key) != there.get(key)
    ]


def _completed(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe of a record with every key: those that it came before, or leaves out, at their defaults."""
    from pydantic import ValidationError

    from rankbits.recipes.schema import Recipe

    try:
        return Recipe.model_validate(dict(recipe)).model_dump()
    except ValidationError:
        return recipe


def _flat(recipe: Mapping[str, Any]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name in SAME_WORK:
        section = recipe.get(name)
        flat |= {f"{name}.{key}": section[key] for key in section} if isinstance(section, Mapping) else {name: section}
    return flat
