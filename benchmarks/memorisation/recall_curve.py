"""Character accuracy over steps: what a model in training knows by heart is measured whenever the Trainer logs."""

from __future__ import annotations

from typing import Any

from points import CURVE
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankbits import tasks
from rankbits.recipes import encoding
from rankbits.recipes.recall import recalled
from rankbits.recipes.schema import Recipe

BATCH = 256
"""Values generated together."""


class RecallCurve(TrainerCallback):
    """Adds the character accuracy on the rows that are learned to each entry of the log, and so to the run's record."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure; the summary at the end of training has no loss and is left as it is."""
        if logs is None or "loss" not in logs:
            return
        own, tokenizer = self.recipe.task, kwargs["processing_class"]
        task = tasks.get(own.name)
        seed = self.recipe.training.seed
        rows = tasks.load(task, data=own.data, train_rows=own.train_rows, evaluate_on=own.evaluate_on, seed=seed).train
        encoded = encoding.encode(rows, task, tokenizer, own.max_length)
        counts = recalled(kwargs["model"], tokenizer, task, rows, encoded, BATCH)
        logs[CURVE] = state.log_history[-1][CURVE] = task.score(counts, counts)[CURVE]
