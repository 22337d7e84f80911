"""The Trainer of a recipe: its settings, what it is given, and training from a checkpoint or from the start."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerState, TrainingArguments

from rankbits import tasks
from rankbits.errors import RecipeError
from rankbits.recipes import encoding, facts, methods
from rankbits.recipes.four_bits import optimizer
from rankbits.recipes.run_folder import RunFolder
from rankbits.recipes.schema import Recipe
from rankbits.recipes.scoring import reduction
from rankbits.records import TrainingRecord
from rankbits.tasks import Task, TaskData
from rankbits.training.callback import FiniteLossCallback

Trainable = PeftModel | PreTrainedModel


def make_trainer(
    recipe: Recipe, task: Task, data: TaskData, model: Trainable, tokenizer: Any, folder: RunFolder
) -> Trainer:
    """The Trainer of a run, with the callbacks and the optimizer that the recipe's method needs.

    Raises:
        RecipeError: this machine or installation cannot honour the settings, or a budget cannot be met.
    """
    given = arguments(recipe, str(folder.checkpoints), recipe.training.report_to or "none")
    train = encoding.encode(data.train, task, tokenizer, recipe.task.max_length)
    parts = methods.training_of(recipe, model, _total_steps(given, len(train)))
    try:
        trainer = Trainer(
            model=model,
            args=given,
            train_dataset=train,
            data_collator=encoding.collator(task, tokenizer),
            processing_class=tokenizer,
            preprocess_logits_for_metrics=reduction(task),
            callbacks=list(parts.callbacks),
            optimizers=parts.optimizers or (None, None),
        )
    except (ValueError, RuntimeError, ImportError) as reason:
        raise RecipeError(f"training: the Trainer refuses these settings: {reason}") from reason
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(FiniteLossCallback(model))
    # Trackers hear of a log in the order of callbacks: ours adds bits and ranks before they do.
    trainer.callback_handler.callbacks.sort(key=lambda callback: callback not in parts.callbacks)
    return trainer


def arguments(recipe: Recipe, output_folder: str, report_to: list[str] | str) -> TrainingArguments:
    """The Trainer's settings. RecipeError if this machine or installation cannot honour them."""
    try:
        return TrainingArguments(**_settings(recipe), output_dir=output_folder, report_to=report_to)
    except (ValueError, RuntimeError, ImportError) as reason:
        raise RecipeError(f"training: the Trainer refuses these settings: {reason}") from reason


def _settings(recipe: Recipe) -> dict[str, Any]:
    training = recipe.training
    # A language model's outputs are as many times larger than a classifier's as it knows words.
    completes = tasks.get(recipe.task.name).kind == "completion"
    paged, _ = optimizer(recipe)
    return {
        **({"optim": paged} if paged else {}),
        "num_train_epochs": training.epochs or 1.0,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.batch_size * (1 if completes else 4),
        "gradient_accumulation_steps": training.accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.scheduler,
        "warmup_steps": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "seed": training.seed,
        "data_seed": training.seed,
        "save_steps": training.save_steps,
        "save_total_limit": 2,
        "logging_steps": training.logging_steps,
        "bf16": training.precision == "bf16",
        "train_sampling_strategy": "group_by_length" if training.group_by_length else "random",
        "activation_checkpointing": training.gradient_checkpointing,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "run_name": recipe.name,
        "disable_tqdm": True,
        "eval_strategy": "no",
    }


def _total_steps(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps that the Trainer will make, by its own rule."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batches = math.ceil(rows / arguments.train_batch_size)
    per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    return math.ceil(arguments.num_train_epochs * per_epoch)


def train(trainer: Trainer, folder: RunFolder, announce: Callable[[str], object]) -> TrainingRecord:
    """Train from the folder's newest checkpoint, or from the start."""
    checkpoint = folder.last_checkpoint()
    announce(f"train: resuming from {checkpoint.name}" if checkpoint else "train")
    started = time.monotonic()
    _continue(trainer, checkpoint)
    # Of a resumed run the Trainer's own mean leaves out the losses before the checkpoint; the log has them all.
    losses = [entry["loss"] for entry in history(trainer)]
    return TrainingRecord(
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0.0),
        seconds=time.monotonic() - started,
        train_loss=sum(losses) / len(losses) if losses else 0.0,
        peak_memory_bytes=facts.peak_memory_bytes(),
        resumed=checkpoint is not None,
    )


def _continue(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train from a checkpoint, or from the start; a checkpoint of the last step only has to be loaded."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    if state is None or state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return
    trainer.state = state
    model: Any = trainer.model
    if isinstance(model, PeftModel):
        model.load_adapter(str(checkpoint), "default", is_trainable=True)
    else:
        model.load_state_dict(type(model).from_pretrained(str(checkpoint)).state_dict())


def history(trainer: Trainer) -> list[dict[str, float]]:
    """What was logged while it trained, one entry per logged step."""
    return [
        {key: float(value) for key, value in entry.items()} for entry in trainer.state.log_history if "loss" in entry
    ]
