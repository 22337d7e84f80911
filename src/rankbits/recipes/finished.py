"""The model of a finished run, loaded from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from rankbits import tasks
from rankbits.errors import RunFolderError
from rankbits.recipes import models
from rankbits.recipes.run_folder import ADAPTER_FOLDER, RECIPE_FILE, RECORD_FILE, read_recipe
from rankbits.recipes.schema import Recipe


@dataclass(frozen=True)
class FinishedRun:
    """What a run has left.

    Args:
        recipe: what was run.
        model: the base model with the finished adapter, set to evaluate.
        tokenizer: of the base model.
    """

    recipe: Recipe
    model: PeftModel
    tokenizer: Any


def load_finished(run_folder: Path) -> FinishedRun:
    """Load the model of a run that has finished.

    Raises:
        RunFolderError: the folder holds no finished run, or its adapter does not fit the base model.
        AssetError, ModelError: the base model cannot be found or loaded.
    """
    for name in (RECIPE_FILE, RECORD_FILE, ADAPTER_FOLDER):
        if not (run_folder / name).exists():
            raise RunFolderError(f"{run_folder} holds no finished run: {name} is missing")
    recipe = read_recipe(run_folder / RECIPE_FILE)
    base = models.load_model(recipe.model, tasks.get(recipe.task.name))
    try:
        model = PeftModel.from_pretrained(base, str(run_folder / ADAPTER_FOLDER))
    except (OSError, ValueError, RuntimeError, SafetensorError) as reason:
        raise RunFolderError(
            f"{run_folder / ADAPTER_FOLDER} cannot be loaded onto {recipe.model!r}: {reason}"
        ) from reason
    return FinishedRun(recipe, model.eval(), models.load_tokenizer(recipe.model))
