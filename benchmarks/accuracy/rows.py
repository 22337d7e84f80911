"""The rows of a recipe as batches, for work that is not the Trainer's: calibrating and scoring a plain model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankbits import tasks
from rankbits.recipes import models
from rankbits.recipes.schema import Recipe
from rankbits.tasks import Task, TaskData

BATCH = 128


@dataclass(frozen=True)
class Rows:
    """Tokenized rows: token ids by row, and the labels.

    Args:
        encoded: what the tokenizer gives, one list a row.
        labels: [rows].
    """

    encoded: list[dict[str, list[int]]]
    labels: np.ndarray[Any, Any]


def load_rows(recipe: Recipe, *, development: bool = False) -> TaskData:
    """The recipe's rows; with `development`, those split off its training rows instead of validation."""
    return tasks.load(
        tasks.get(recipe.task.name),
        data=recipe.task.data,
        train_rows=recipe.task.train_rows,
        evaluate_on="development" if development else recipe.task.evaluate_on,
        seed=recipe.training.seed,
    )


def tokenized(rows: Any, task: Task, tokenizer: Any, max_length: int) -> Rows:
    """Rows of a data set as token ids, cut to `max_length`."""
    encoded = tokenizer(*[list(rows[c]) for c in task.text_columns], truncation=True, max_length=max_length)
    columns = list(encoded)
    lists = [dict(zip(columns, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    return Rows(lists, np.asarray(rows["label"]))


def batches(rows: Rows, tokenizer: Any, order: list[int], size: int = BATCH) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """Padded tensors [size, tokens] and labels, in the order given."""
    for start in range(0, len(order), size):
        part = order[start : start + size]
        padded = tokenizer.pad([rows.encoded[index] for index in part], return_tensors="pt")
        yield dict(padded), rows.labels[part]


@torch.inference_mode()
def score(model: nn.Module, rows: Rows, task: Task, tokenizer: Any) -> dict[str, float]:
    """The task's metrics of a model in evaluation mode, in percent. Rows of like length are scored together."""
    model.eval()
    order = sorted(range(len(rows.encoded)), key=lambda index: len(rows.encoded[index]["input_ids"]))
    outputs = [(model(**batch).logits, labels) for batch, labels in batches(rows, tokenizer, order)]
    logits = torch.cat([output for output, _ in outputs]).float().numpy()  # [rows, outputs]
    return task.score(logits, np.concatenate([labels for _, labels in outputs]))


def tokenizer_of(recipe: Recipe) -> Any:
    """The tokenizer of the recipe's model."""
    return models.load_tokenizer(recipe.model)
