"""One experiment from recipe to record: load, attach, train, harden, evaluate, save, account, record."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from peft import PeftModel, TaskType
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed

from rankbits import tasks
from rankbits.accounting.measure import cost
from rankbits.accounting.measure.inputs import largest_length
from rankbits.errors import ModelError, RunFolderError
from rankbits.recipes import encoding, facts, methods, models
from rankbits.recipes.finished import finished_recipe, load_trained
from rankbits.recipes.four_bits import optimizer, quantization
from rankbits.recipes.freezing import save_whole
from rankbits.recipes.run_folder import (
    RECORD_FILE,
    RunFolder,
    work_of,
)
from rankbits.recipes.schema import Recipe
from rankbits.recipes.scoring import reduction, score, score_at_ranks
from rankbits.recipes.sizes import virtual_tokens
from rankbits.recipes.trainer import Trainable, arguments, history, make_trainer, train
from rankbits.records import CostRecord, DataRecord, RunRecord, ScoreRecord, recipe_hash
from rankbits.tasks import Task, TaskData
from rankbits.tuners.bayesian_lora import harden, summarize
from rankbits.tuners.register import TUNERS

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
    base = _load_base(recipe, task, data)
    model = methods.attach(recipe, base, TaskType.CAUSAL_LM if task.kind == "completion" else TaskType.SEQ_CLS)
    trainer = make_trainer(recipe, task, data, model, tokenizer, folder)
    folder.claim()
    _, note = optimizer(recipe)
    if note:
        announce(note)
    for callback in callbacks:
        trainer.add_callback(callback)
    parameters = facts.parameters(model)
    training = train(trainer, folder, announce)
    methods.finish(recipe, model)
    summaries = summarize(model)
    modules, budgets = facts.learned(model, summaries), facts.budgets(trainer.callback_handler.callbacks)
    if summaries:
        announce("harden: fixing ranks and bit widths")
        harden(model)
    announce("evaluate")
    scores = score(trainer, task, data, recipe) + score_at_ranks(trainer, task, data, recipe)
    _save(model, tokenizer, folder)
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
        history=history(trainer),
        budgets=budgets,
        costs=_account(model, recipe, announce),
    )
    record.write(folder.path / RECORD_FILE)
    return record


def _account(model: Trainable, recipe: Recipe, announce: Callable[[str], object]) -> CostRecord | None:
    """What a forward pass costs at the task's longest rows; None, said aloud, where that cannot be counted."""
    announce("account: counting one forward pass")
    try:
        return cost(model, sequence_length=recipe.task.max_length)
    except ModelError as reason:
        # Training is over: a model that runs but cannot be counted still gets its record.
        announce(f"account: not counted: {reason}")
        return None


def _load_base(recipe: Recipe, task: Task, data: TaskData) -> PreTrainedModel:
    base = models.load_model(recipe.model, task, quantization(recipe))
    _check_length(recipe, base)
    if recipe.task.start_at_mean:
        models.start_head_at(base, fmean(data.train["label"]))
    return base


def _check_length(recipe: Recipe, base: PreTrainedModel) -> None:
    positions, before = largest_length(base), virtual_tokens(recipe)
    if positions is not None and positions < recipe.task.max_length + before:
        taken = f" and {before} virtual tokens come first" if before else ""
        raise ModelError(
            f"task.max_length: given {recipe.task.max_length}, but {recipe.model!r} has {positions} positions{taken}, "
            f"so at most {positions - before}"
        )


def _load_data(recipe: Recipe, task: Task) -> TaskData:
    return tasks.load(
        task,
        data=recipe.task.data,
        train_rows=recipe.task.train_rows,
        evaluate_on=recipe.task.evaluate_on,
        seed=recipe.training.seed,
    )


def _save(model: Trainable, tokenizer: Any, folder: RunFolder) -> None:
    if not isinstance(model, PeftModel):
        save_whole(model, tokenizer, folder.model)
        return
    model.save_pretrained(str(folder.adapter))
    card = folder.adapter / "README.md"
    if model.active_peft_config.peft_type in TUNERS and card.is_file():
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


def evaluate(run_folder: Path, *, task: str | None = None, data: str | None = None) -> list[ScoreRecord]:
    """Score a finished run, on its own evaluation rows or on others.

    Args:
        run_folder: folder of a run that has finished.
        task: another task with the same labels; None takes the run's own.
        data: where that task's rows come from; None takes the recipe's source.

    Raises:
        RunFolderError: the folder holds no finished run, or its head does not fit the task.
    """
    recipe = finished_recipe(run_folder)
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
    # What was memorised is scored on the rows that were learned; elsewhere fewer rows to learn from change no score.
    rows_kept = recipe.task.train_rows if wanted.memorised else None
    section = recipe.task.model_copy(update={"name": wanted.name, "train_rows": rows_kept})
    if task is not None or data is not None:
        section = section.model_copy(update={"data": data})
    elsewhere = recipe.model_copy(update={"task": section})
    rows = _load_data(elsewhere, wanted)
    model = load_trained(recipe, run_folder)
    tokenizer = models.load_tokenizer(recipe.model)
    # The Trainer makes a folder for checkpoints, which has no business in a finished run.
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=arguments(elsewhere, folder, "none"),
            data_collator=encoding.collator(wanted, tokenizer),
            processing_class=tokenizer,
            preprocess_logits_for_metrics=reduction(wanted),
        )
        return score(trainer, wanted, rows, elsewhere)
