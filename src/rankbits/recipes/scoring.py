"""Scores of a trained model on a task's evaluation rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Trainer

from rankbits.recipes import encoding
from rankbits.recipes.recall import recalled
from rankbits.recipes.schema import Recipe
from rankbits.records import ScoreRecord
from rankbits.records.metrics import at_rank
from rankbits.tasks import Task, TaskData
from rankbits.tasks.likelihood import answer_nats
from rankbits.tuners.dylora import adapted_layers, set_rank


def reduction(task: Task) -> Callable[[Any, Any], Any] | None:
    """What is kept of a batch's outputs while scoring: a score a word for every token of every row has no room."""
    return _nats_of_rows if task.kind == "completion" else None


def _nats_of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    # The tokens of a prompt come first and have no labels.
    return answer_nats(logits[:, -labels.shape[1] :], labels)


def score(trainer: Trainer, task: Task, data: TaskData, recipe: Recipe) -> list[ScoreRecord]:
    """Every metric of the task on every evaluation split; the first split's primary metric is the headline."""
    scores = []
    for index, (split, rows) in enumerate(data.evaluation.items()):
        encoded = encoding.encode(rows, task, trainer.processing_class, recipe.task.max_length)
        if task.memorised:
            counts = recalled(
                trainer.model, trainer.processing_class, task, rows, encoded, trainer.args.eval_batch_size
            )
            values = task.score(counts, counts)
        else:
            # A batch is padded to its longest row: rows of like length together take half the time, in any order.
            lengths = [len(ids) for ids in encoded["input_ids"]]
            output: Any = trainer.predict(encoded.select(sorted(range(len(lengths)), key=lengths.__getitem__)))
            values = task.score(output.predictions, output.label_ids)
        for metric, value in values.items():
            primary = index == 0 and metric == task.primary_metric
            scores.append(ScoreRecord(metric=metric, value=value, split=split, primary=primary))
    return scores


def score_at_ranks(trainer: Trainer, task: Task, data: TaskData, recipe: Recipe) -> list[ScoreRecord]:
    """Scores at the further ranks that a DyLoRA recipe asks for, each metric named after its rank; else none.

    The model is left at the rank it is evaluated at.
    """
    model: Any = trainer.model
    if next(adapted_layers(model), None) is None:
        return []
    usual = recipe.adapter.dylora.evaluation_rank or recipe.adapter.r
    scores = []
    for rank in recipe.adapter.dylora.evaluate_ranks:
        set_rank(model, rank)
        found = score(trainer, task, data, recipe)
        scores += [s.model_copy(update={"metric": at_rank(s.metric, rank), "primary": False}) for s in found]
    set_rank(model, usual)
    return scores
