"""One experiment from recipe to record: load, attach, train, harden, evaluate, save, account, record."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, TaskType
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from rankbits import tasks
from rankbits.accounting.measure import cost
from rankbits.accounting.measure.inputs import largest_length
from rankbits.errors import ModelError, RecipeError, RunFolderError, ScheduleError
from rankbits.recipes import encoding, facts, methods, models
from rankbits.recipes.question import budgets_of
from rankbits.recipes.run_folder import ADAPTER_FOLDER, RECIPE_FILE, RECORD_FILE, RunFolder, read_recipe, work_of
from rankbits.recipes.schema import Recipe
from rankbits.records import CostRecord, DataRecord, RunRecord, ScoreRecord, TrainingRecord, recipe_hash
from rankbits.tasks import Task, TaskData
from rankbits.tasks.likelihood import answer_nats
from rankbits.training.callback import FiniteLossCallback, RankbitsCallback
from rankbits.training.groups import GateRates, optimizer_and_scheduler
from rankbits.training.schedule import GateSchedule
from rankbits.tuners.bayesian_lora import harden, learning_adapters, summarize

CARD_HEAD = """## How to load this adapter

```python
import rankbits  # makes PEFT know the method
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

"""


def run(
    recipe: Recipe,
    *,
    command: str,
    callbacks: Sequence[TrainerCallback] = (),
    announce: Callable[[str], object] = str,
) -> RunRecord:
    """Fine-tune what a recipe says, in its output folder, resuming there if it was interrupted.

    Args:
        recipe: the whole experiment.
        command: what the user typed, for the record.
        callbacks: further Trainer callbacks, such as a progress bar.
        announce: told in a few words what is being done; by default nobody is.

    Returns:
        The record, also if the run had finished before.

    Raises:
        RankbitsError: anything the user can mend; a new folder is left without half-written files.
    """
    folder = RunFolder(Path(recipe.output or f"runs/{recipe.name}"), recipe)
    finished = folder.inspect()
    if finished is not None:
        announce(f"finished before: {folder.path}")
        return finished
    task = tasks.get(recipe.task.name)
    announce(f"data: {task.name}")
    data = _load_data(recipe, task)
    announce(f"model: {recipe.model}")
    set_seed(recipe.training.seed)
    tokenizer = models.load_tokenizer(recipe.model)
    base = models.load_model(recipe.model, task)
    _check_length(recipe, base)
    model = methods.attach(recipe, base, TaskType.CAUSAL_LM if task.kind == "completion" else TaskType.SEQ_CLS)
    trainer = _trainer(recipe, task, data, model, tokenizer, folder)
    folder.claim()
    for callback in callbacks:
        trainer.add_callback(callback)
    parameters = facts.parameters(model)
    training = _train(trainer, folder, announce)

    summaries = summarize(model)
    modules, budgets = facts.learned(model, summaries), facts.budgets(trainer.callback_handler.callbacks)
    if summaries:
        announce("harden: fixing ranks and bit widths")
        harden(model)
    announce("evaluate")
    scores = _score(trainer, task, data, recipe)
    _save_adapter(model, folder, with_import=bool(summaries))
    record = RunRecord(
        name=recipe.name,
        method=recipe.method,
        recipe=work_of(recipe),
        recipe_hash=recipe_hash(work_of(recipe)),
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=recipe.training.seed,
        versions=facts.versions(),
        machine=facts.machine(),
        data=_data_record(recipe, data),
        scores=scores,
        training=training,
        parameters=parameters,
        modules=modules,
        history=_history(trainer),
        budgets=budgets,
        costs=_account(model, recipe, announce),
    )
    record.write(folder.path / RECORD_FILE)
    return record


def _account(model: PeftModel, recipe: Recipe, announce: Callable[[str], object]) -> CostRecord | None:
    """What a forward pass costs at the task's longest rows; None, said aloud, where that cannot be counted."""
    announce("account: counting one forward pass")
    try:
        return cost(model, sequence_length=recipe.task.max_length)
    except ModelError as reason:
        # Training is over: a model that runs but cannot be counted still gets its record.
        announce(f"account: not counted: {reason}")
        return None


def _check_length(recipe: Recipe, base: PreTrainedModel) -> None:
    positions = largest_length(base)
    if positions is not None and positions < recipe.task.max_length:
        raise ModelError(
            f"task.max_length: given {recipe.task.max_length}, but {recipe.model!r} has {positions} positions, so at "
            f"most {positions}"
        )


def _load_data(recipe: Recipe, task: Task) -> TaskData:
    return tasks.load(
        task,
        data=recipe.task.data,
        train_rows=recipe.task.train_rows,
        evaluate_on=recipe.task.evaluate_on,
        seed=recipe.training.seed,
    )


def _trainer(
    recipe: Recipe, task: Task, data: TaskData, model: PeftModel, tokenizer: Any, folder: RunFolder
) -> Trainer:
    arguments = _arguments(recipe, str(folder.checkpoints), recipe.training.report_to or "none")
    train = encoding.encode(data.train, task, tokenizer, recipe.task.max_length)
    trainer_arguments: dict[str, Any] = {}
    if next(learning_adapters(model), None) is not None:
        schedule = _schedule(recipe, model, _total_steps(arguments, len(train)))
        trainer_arguments["optimizers"] = _optimizers(recipe, schedule)
        trainer_arguments["callbacks"] = [RankbitsCallback(schedule)]
    try:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=train,
            data_collator=encoding.collator(task, tokenizer),
            processing_class=tokenizer,
            preprocess_logits_for_metrics=_reduction(task),
            **trainer_arguments,
        )
    except (ValueError, RuntimeError, ImportError) as reason:
        raise RecipeError(f"training: the Trainer refuses these settings: {reason}") from reason
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(FiniteLossCallback(model))
    # Trackers hear of a log in the order of callbacks: ours adds bits and ranks before they do.
    trainer.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, RankbitsCallback))
    return trainer


def _arguments(recipe: Recipe, output_folder: str, report_to: list[str] | str) -> TrainingArguments:
    """The Trainer's settings. RecipeError if this machine or installation cannot honour them."""
    try:
        return TrainingArguments(**_settings(recipe), output_dir=output_folder, report_to=report_to)
    except (ValueError, RuntimeError, ImportError) as reason:
        raise RecipeError(f"training: the Trainer refuses these settings: {reason}") from reason


def _settings(recipe: Recipe) -> dict[str, Any]:
    training = recipe.training
    # A language model's outputs are as many times larger than a classifier's as it knows words.
    completes = tasks.get(recipe.task.name).kind == "completion"
    return {
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


def _schedule(recipe: Recipe, model: PeftModel, total_steps: int) -> GateSchedule:
    """The gate schedule of a recipe. RecipeError if its budget or lambdas do not suit the model or the run."""
    gates = recipe.gates
    try:
        return GateSchedule(
            model,
            total_steps,
            budget=budgets_of(recipe),
            allocation=gates.allocation,
            lambda_q=gates.lambda_q,
            lambda_r=gates.lambda_r,
            phases=(gates.warmup, gates.ramp, gates.fixed),
            weighting=gates.weighting,
            reduction=gates.reduction,
        )
    except ScheduleError as reason:
        raise RecipeError(f"gates: {reason}") from reason


def _optimizers(recipe: Recipe, schedule: GateSchedule) -> tuple[Any, Any]:
    training, gates = recipe.training, recipe.gates
    return optimizer_and_scheduler(
        schedule,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        decay=training.scheduler.removesuffix("_with_warmup"),
        warmup_steps=math.ceil(training.warmup_ratio * schedule.total_steps),
        rates=GateRates(
            gates=None if gates.learning_rate == "auto" else gates.learning_rate,
            ranges=gates.range_learning_rate,
            eps=gates.eps,
        ),
    )


def _reduction(task: Task) -> Callable[[Any, Any], Any] | None:
    """What is kept of a batch's outputs while scoring: a score a word for every token of every row has no room."""
    return answer_nats if task.kind == "completion" else None


def _train(trainer: Trainer, folder: RunFolder, announce: Callable[[str], object]) -> TrainingRecord:
    checkpoint = folder.last_checkpoint()
    announce(f"train: resuming from {checkpoint.name}" if checkpoint else "train")
    started = time.monotonic()
    _continue(trainer, checkpoint)
    # Of a resumed run the Trainer's own mean leaves out the losses before the checkpoint; the log has them all.
    losses = [entry["loss"] for entry in _history(trainer)]
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
    model.load_adapter(str(checkpoint), "default", is_trainable=True)


def _score(trainer: Trainer, task: Task, data: TaskData, recipe: Recipe) -> list[ScoreRecord]:
    scores = []
    for index, (split, rows) in enumerate(data.evaluation.items()):
        encoded = encoding.encode(rows, task, trainer.processing_class, recipe.task.max_length)
        # A batch is padded to its longest row: rows of like length together take half the time, in any order.
        lengths = [len(ids) for ids in encoded["input_ids"]]
        output: Any = trainer.predict(encoded.select(sorted(range(len(lengths)), key=lengths.__getitem__)))
        for metric, value in task.score(output.predictions, output.label_ids).items():
            primary = index == 0 and metric == task.primary_metric
            scores.append(ScoreRecord(metric=metric, value=value, split=split, primary=primary))
    return scores


def _save_adapter(model: PeftModel, folder: RunFolder, *, with_import: bool) -> None:
    model.save_pretrained(str(folder.adapter))
    card = folder.adapter / "README.md"
    if with_import and card.is_file():
        text = card.read_text(encoding="utf-8")
        head, mark, rest = text.rpartition("\n---\n")
        card.write_text(f"{head}{mark}\n{CARD_HEAD}{rest.lstrip()}", encoding="utf-8")


def _data_record(recipe: Recipe, data: TaskData) -> DataRecord:
    return DataRecord(
        task=recipe.task.name,
        split=recipe.task.evaluate_on,
        train_rows=len(data.train),
        evaluation_rows={split: len(rows) for split, rows in data.evaluation.items()},
        dropped=data.dropped,
        fingerprint=data.fingerprint,
        source=data.source,
    )


def _history(trainer: Trainer) -> list[dict[str, float]]:
    return [
        {key: float(value) for key, value in entry.items()} for entry in trainer.state.log_history if "loss" in entry
    ]


def evaluate(run_folder: Path, *, task: str | None = None, data: str | None = None) -> list[ScoreRecord]:
    """Score a finished run, on its own evaluation rows or on others.

    Args:
        run_folder: folder of a run that has finished.
        task: another task with the same labels; None takes the run's own.
        data: where that task's rows come from; None takes the recipe's source.

    Raises:
        RunFolderError: the folder holds no finished run, or its head does not fit the task.
    """
    for name in (RECIPE_FILE, RECORD_FILE, ADAPTER_FOLDER):
        if not (run_folder / name).exists():
            raise RunFolderError(f"{run_folder} holds no finished run: {name} is missing")
    recipe = read_recipe(run_folder / RECIPE_FILE)
    own, wanted = tasks.get(recipe.task.name), tasks.get(task or recipe.task.name)
    if (own.kind == "completion") != (wanted.kind == "completion"):
        raise RunFolderError(
            f"{run_folder} was trained on {own.name!r}; task {wanted.name!r} needs the head of a "
            f"{'language model' if wanted.kind == 'completion' else 'classifier'}"
        )
    if own.num_labels != wanted.num_labels:
        raise RunFolderError(
            f"{run_folder} was trained on {own.name!r} with {own.num_labels} outputs; task {wanted.name!r} needs "
            f"{wanted.num_labels}"
        )
    section = recipe.task.model_copy(update={"name": wanted.name, "train_rows": None})
    if task is not None or data is not None:
        section = section.model_copy(update={"data": data})
    recipe = recipe.model_copy(update={"task": section})
    rows = _load_data(recipe, wanted)
    base = models.load_model(recipe.model, own)
    try:
        model = PeftModel.from_pretrained(base, str(run_folder / ADAPTER_FOLDER))
    except (OSError, ValueError, RuntimeError, SafetensorError) as reason:
        raise RunFolderError(
            f"{run_folder / ADAPTER_FOLDER} cannot be loaded onto {recipe.model!r}: {reason}"
        ) from reason
    tokenizer = models.load_tokenizer(recipe.model)
    # The Trainer makes a folder for checkpoints, which has no business in a finished run.
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=_arguments(recipe, folder, "none"),
            data_collator=encoding.collator(wanted, tokenizer),
            processing_class=tokenizer,
            preprocess_logits_for_metrics=_reduction(wanted),
        )
        return _score(trainer, wanted, rows, recipe)
