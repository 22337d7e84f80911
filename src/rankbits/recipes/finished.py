"""The model of a finished run, loaded from its folder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from rankbits import tasks
from rankbits.errors import ModelError, RunFolderError
from rankbits.recipes import methods, models
from rankbits.recipes.four_bits import quantization
from rankbits.recipes.run_folder import ADAPTER_FOLDER, MODEL_FOLDER, RECIPE_FILE, RECORD_FILE, read_recipe
from rankbits.recipes.schema import Recipe
from rankbits.recipes.trainer import Trainable
from rankbits.training.adalora_schedule import task_loss_only


@dataclass(frozen=True)
class FinishedRun:
    """What a run has left.

    Args:
        recipe: what was run.
        model: the base model with the finished adapter, or the whole model where the method has none; set to evaluate.
        tokenizer: of the base model.
    """

    recipe: Recipe
    model: Trainable
    tokenizer: Any


def load_finished(run_folder: Path) -> FinishedRun:
    """Load the model of a run that has finished.

    Raises:
        RunFolderError: the folder holds no finished run, or its adapter does not fit the base model.
        AssetError, ModelError: the base model cannot be found or loaded.
    """
    recipe = finished_recipe(run_folder)
    return FinishedRun(recipe, load_trained(recipe, run_folder).eval(), models.load_tokenizer(recipe.model))


def finished_recipe(run_folder: Path) -> Recipe:
    """The recipe of a run. RunFolderError if the folder holds no run that has finished."""
    recipe_file = _require(run_folder, RECIPE_FILE)
    _require(run_folder, RECORD_FILE)
    return read_recipe(recipe_file)


def load_trained(recipe: Recipe, run_folder: Path) -> Trainable:
    """The model of a finished run, with its adapter or as a whole.

    Args:
        recipe: the run's own.
        run_folder: where it was run.

    Raises:
        RunFolderError: what the run has left is not there, or does not fit the base model.
        AssetError, ModelError: the base model cannot be found or loaded.
    """
    task = tasks.get(recipe.task.name)
    if recipe.method in methods.WITHOUT_ADAPTERS:
        whole = _require(run_folder, MODEL_FOLDER)
        try:
            return models.load_model(str(whole), task)
        except ModelError as reason:
            raise RunFolderError(f"{whole} cannot be loaded: {reason}") from reason
    adapter = _require(run_folder, ADAPTER_FOLDER)
    base = models.load_model(recipe.model, task, quantization(recipe))
    try:
        with warnings.catch_warnings():
            # PEFT takes the names of AdaLoRA's own diagonals for names of modules; it loads them all the same.
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
            model = PeftModel.from_pretrained(base, str(adapter))
    except (OSError, ValueError, RuntimeError, SafetensorError) as reason:
        raise RunFolderError(f"{adapter} cannot be loaded onto {recipe.model!r}: {reason}") from reason
    task_loss_only(model)
    return model


def _require(run_folder: Path, name: str) -> Path:
    if not (run_folder / name).exists():
        raise RunFolderError(f"{run_folder} holds no finished run: {name} is missing")
    return run_folder / name
