"""AdaLoRA by PEFT, at LoRA's scale and mean rank: same rows, steps, head and schedule, its own allocation of ranks."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from typing import Any, cast

from peft import AdaLoraConfig, PeftModel, TaskType, get_peft_model
from rows import load_rows, score, tokenized, tokenizer_of
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from rankbits import tasks
from rankbits.recipes import facts, models
from rankbits.recipes.run_folder import work_of
from rankbits.recipes.schema import Recipe
from rankbits.records import DataRecord, ModuleRecord, RunRecord, ScoreRecord, TrainingRecord, recipe_hash
from rankbits.tasks import Task, TaskData

EXTRA_RANK = 1.5
"""It starts with half as much again as it ends with, as in its paper (Zhang et al. 2023, section 4)."""
STARTS_AT, ENDS_AT, EVERY = 0.1, 0.4, 10
"""Shares of the steps before the budget falls and after it has fallen, and the steps between two masks."""
ORTHOGONALITY = 0.1


class Allocate(TrainerCallback):
    """Lets AdaLoRA move its ranks: between the optimizer's step and the zeroing of gradients, which it reads."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Without this call the ranks would silently never change."""
        kwargs["model"].base_model.update_and_allocate(state.global_step)


def config_of(recipe: Recipe, total_steps: int) -> AdaLoraConfig:
    """AdaLoRA with LoRA's mean rank at the end and LoRA's scale alpha / r throughout.

    PEFT divides its alpha by the rank that it starts with, whatever ranks are left.
    """
    adapter = recipe.adapter
    initial = round(EXTRA_RANK * adapter.r)
    return AdaLoraConfig(
        task_type=TaskType.SEQ_CLS,
        init_r=initial,
        target_r=adapter.r,
        lora_alpha=adapter.alpha * initial / adapter.r,  # type: ignore[arg-type]
        tinit=round(STARTS_AT * total_steps),
        tfinal=round(ENDS_AT * total_steps),
        deltaT=EVERY,
        orth_reg_weight=ORTHOGONALITY,
        total_step=total_steps,
        target_modules=adapter.targets,
        modules_to_save=adapter.modules_to_save,
    )


def train(recipe: Recipe, *, command: str) -> RunRecord:
    """One run from recipe to record. It does not resume: the importance of ranks lives in no checkpoint."""
    task = tasks.get(recipe.task.name)
    data = load_rows(recipe)
    set_seed(recipe.training.seed)
    tokenizer = tokenizer_of(recipe)
    base = models.load_classifier(recipe.model, task)
    rows = _examples(data, task, tokenizer, recipe.task.max_length)
    steps = math.ceil((recipe.training.epochs or 1.0) * math.ceil(len(rows) / recipe.training.batch_size))
    model = get_peft_model(base, config_of(recipe, steps))
    parameters = facts.parameters(model)
    trained = _train(_trainer(recipe, model, rows, tokenizer, steps))
    ((split, held),) = data.evaluation.items()
    found = score(model, tokenized(held, task, tokenizer, recipe.task.max_length), task, tokenizer)
    content = {**work_of(recipe), "method": "adalora"}
    return RunRecord(
        name=recipe.name,
        method="adalora",
        recipe=content,
        recipe_hash=recipe_hash(content),
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=recipe.training.seed,
        versions=facts.versions(),
        machine=facts.machine(),
        data=_data_record(data, task, split),
        scores=[
            ScoreRecord(metric=metric, value=value, split=split, primary=metric == task.primary_metric)
            for metric, value in found.items()
        ],
        training=trained,
        parameters=parameters,
        modules=ranks_of(model),
        history=[],
    )


def _examples(data: TaskData, task: Task, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    encoded = tokenized(data.train, task, tokenizer, max_length)
    return [{**row, "labels": label} for row, label in zip(encoded.encoded, encoded.labels.tolist(), strict=True)]


def _trainer(recipe: Recipe, model: PeftModel, rows: list[dict[str, Any]], tokenizer: Any, steps: int) -> Trainer:
    trainer = Trainer(
        model=model,
        args=_arguments(recipe, steps),
        train_dataset=cast(Any, rows),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[Allocate()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train(trainer: Trainer) -> TrainingRecord:
    started = time.monotonic()
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return TrainingRecord(
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0.0),
        seconds=time.monotonic() - started,
        train_loss=sum(losses) / len(losses) if losses else 0.0,
        peak_memory_bytes=facts.peak_memory_bytes(),
        resumed=False,
    )


def _data_record(data: TaskData, task: Task, split: str) -> DataRecord:
    return DataRecord(
        task=task.name,
        split=split,
        train_rows=len(data.train),
        evaluation_rows={split: len(data.evaluation[split])},
        dropped=data.dropped,
        fingerprint=data.fingerprint,
        source=data.source,
    )


def _arguments(recipe: Recipe, steps: int) -> TrainingArguments:
    training = recipe.training
    return TrainingArguments(
        output_dir=f"{recipe.output}",
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        data_seed=training.seed,
        train_sampling_strategy="group_by_length" if training.group_by_length else "random",
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=training.logging_steps,
        report_to="none",
        disable_tqdm=True,
    )


def ranks_of(model: PeftModel) -> list[ModuleRecord]:
    """Ranks that are left: entries of E that are not zero."""
    found = []
    for name, module in model.named_modules():
        diagonals = getattr(module, "lora_E", None)
        if diagonals is None or not len(diagonals):
            continue
        ((_, diagonal),) = diagonals.items()
        short = name.removeprefix("base_model.model.")
        layer = next((int(part) for part in short.split(".") if part.isdigit()), None)
        kind = short.rpartition(".layer.")[2].partition(".")[2]
        rank = int(diagonal.count_nonzero())
        found.append(ModuleRecord(name=short, layer=layer, kind=kind, rank=rank, max_rank=len(diagonal)))
    return found
