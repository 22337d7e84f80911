"""Magnitude and direction of the change of weights at every checkpoint of the stock Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankbits.errors import ModelError, ScheduleError
from rankbits.records import WeightChangeRecord
from rankbits.tuners.weight_change import merged_weights, weight_change


class WeightChangeCallback(TrainerCallback):
    """Measures how far the weights have moved whenever a checkpoint is saved (Liu et al. 2024, DoRA, Sec. 3).

    Adapters count as merged; the model is left bit for bit as it is. `points` holds what was measured, in order: a
    record for each layer and checkpoint. A run that is resumed measures the checkpoints from there on.

    Args:
        model: as it is before training, with adapters or without; its weights are copied at once.
        method: name of what trains, for the records.
        target_modules: the linear layers to measure, by their full names or the ends of them, as in PEFT.

    Raises:
        ModelError: no linear layer is called that; at a checkpoint, if the model that trains lacks a layer.
        ScheduleError: when training begins, if the Trainer saves no checkpoints.
        ValueError: at a checkpoint, if a layer has another shape than before.
    """

    def __init__(self, model: nn.Module, method: str, target_modules: Collection[str]) -> None:
        ends = tuple(f".{target}" for target in target_modules)
        self.method = method
        self.before = merged_weights(model, lambda name: f".{name}".endswith(ends))
        self.points: list[WeightChangeRecord] = []
        if not self.before:
            raise ModelError(
                f"target_modules: given {', '.join(target_modules)}, but no linear layer of the model is called that; "
                f"it has {', '.join(merged_weights(model, lambda _name: True)) or 'none'}"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to train without a checkpoint to measure at."""
        if args.save_strategy == "no":
            raise ScheduleError(
                "WeightChangeCallback measures when a checkpoint is saved: given save_strategy 'no', expected 'steps' "
                "or 'epoch'"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure every layer."""
        after = merged_weights(kwargs["model"], self.before.__contains__)
        for layer, weight in self.before.items():
            if layer not in after:
                raise ModelError(f"the model that trains has no linear layer {layer}, which it had before training")
            # The Trainer may have moved the model to another device since its weights were copied.
            change = weight_change(weight, after[layer].to(weight.device))
            point = WeightChangeRecord(method=self.method, layer=layer, step=state.global_step, **change._asdict())
            self.points.append(point)
