"""Scores of a trained model on a task's evaluation rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer

from rankbits.recipes import encoding
from rankbits.recipes.schema import Recipe
from rankbits.records import ScoreRecord
from rankbits.tasks import Task, TaskData
from rankbits.tasks.likelihood import answer_nats


def reduction(task: Task) -> Callable[[Any, Any], Any] | None:
    """What is kept of a batch's outputs while scoring: a score a word for every token of every row has no room."""
    return answer_nats if task.kind == "completion" else None


def score(trainer: Trainer, task: Task, data: TaskData, recipe: Recipe) -> list[ScoreRecord]:
    """Every metric of the task on every evaluation split; the first split's primary metric is the headline."""
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
