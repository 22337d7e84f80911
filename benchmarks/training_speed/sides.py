"""The two sides of the comparison: a model with its adapters, and one whole training step of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from rankbits.quant.quantizer import Quantizer
from rankbits.recipes import methods, models
from rankbits.recipes.load import load
from rankbits.recipes.schema import Recipe
from rankbits.recipes.trainer_parts import gate_schedule
from rankbits.tasks import get
from rankbits.training.groups import GateRates, optimizer_and_scheduler
from rankbits.training.objective import add_regularization_gradient
from rankbits.training.schedule import GateSchedule
from rankbits.tuners.bayesian_lora import learning_adapters

sys.path.append(str(Path(__file__).parent.parent / "accuracy"))
from earlier import learned
from points import FIRST_SEED, GROUP_SIZES, RECIPE, TARGETS

POINT = learned("stsb", 0.25, FIRST_SEED)
"""The point of the accuracy study in groups of 64 whose settings are timed, but for what a variant changes."""
AFFINE = {name: (*RECIPE, f"adapter.group_size={size}") for name, size in GROUP_SIZES.items()}
"""What the points of today's recipe have, at budgets from W4A8 on and below."""
MODULES = {"qkv": "adapter.targets=[query,key,value]", "all": f"adapter.targets={TARGETS}"}
VARIANTS = {
    "lora": ("method=lora", "gates.budget=null"),
    "q-ra": (),
    **AFFINE,
    "descent": ("gates.allocation=descent",),
    "ra": ("adapter.learn_bits=false", "adapter.quantizers=null", "adapter.rounding=nearest", "gates.budget=rank=4"),
}
TOTAL_STEPS = 10_000
MOMENTS = {
    "q-ra": {"standing": 500, "measuring": 1_500, "fixed": 9_000},
    **{name: {"standing": 2_000, "measuring": 5_000, "fixed": 9_000} for name in AFFINE},
    "descent": {"sampled": 6_000},
    "ra": {"sampled": 6_000},
}
"""Completed steps at which each variant is timed, one for every phase that differs. Gates that are chosen by evidence
stand, are measured for the last half of the warm-up, and are fixed; those that descend are sampled and penalised."""
FIXED_LOGITS = (6.0, -3.0, -3.0, -3.0)
"""Of the gates of 4, 8, 16 and 32 bits in the phase with fixed gates: all tensors at 4 bits."""


def recipe(variant: str, changes: tuple[str, ...] = ()) -> Recipe:
    """The recipe of one side, without calibration passes, which would not be timed anyway."""
    short = ("adapter.calibration_passes=1",)
    return load(POINT.recipe, [*POINT.changes, *short, *changes, *VARIANTS[variant]])


def batch_of(rows: int, length: int, vocabulary: int = 30_522) -> dict[str, Tensor]:
    """Random rows of equal length, without padding."""
    ids = torch.randint(1_000, vocabulary, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.rand(rows)}


def quantizers_of(model: PeftModel) -> list[Quantizer]:
    """All that learn."""
    return [module for module in model.modules() if isinstance(module, Quantizer)]


class Side:
    """A model in training.

    Args:
        settings: the recipe it is made by.
        batch: what every step learns from.
    """

    def __init__(self, settings: Recipe, batch: dict[str, Tensor]) -> None:
        task = get(settings.task.name)
        torch.manual_seed(settings.training.seed)
        self.settings, self.batch = settings, batch
        self.model: PeftModel = methods.attach(settings, models.load_classifier(settings.model, task)).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.schedule: GateSchedule | None = None
        self.optimizer: Any = torch.optim.AdamW(self.trained, lr=settings.training.learning_rate, weight_decay=0.0)
        self.scheduler: Any = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        if settings.method == "bayesian-lora":
            self.schedule = gate_schedule(settings, self.model, TOTAL_STEPS)
            self.optimizer, self.scheduler = optimizer_and_scheduler(
                self.schedule, learning_rate=settings.training.learning_rate, rates=GateRates()
            )

    def enter(self, moment: str, completed_steps: int) -> None:
        """Go to a phase, which holds after so many steps."""
        if self.schedule is None:
            return
        if moment == "fixed":
            with torch.no_grad():
                for _, _, gates in learning_adapters(self.model):
                    if gates.bit_logits is not None:
                        gates.bit_logits.copy_(torch.tensor(FIXED_LOGITS).expand_as(gates.bit_logits))
            for quantizer in quantizers_of(self.model):
                if quantizer.lows is not None:
                    # As wide as before, from a low end on: what a fit would leave, whatever it finds.
                    ranges = quantizer.log_range.detach().exp()
                    quantizer.settle(2 * ranges, -ranges)
        self.schedule.restore(completed_steps)

    def step(self) -> None:
        """Forward, backward, clipping, penalty, optimizer, learning rates, gate schedule: what the Trainer does."""
        self.model(**self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.settings.training.max_grad_norm)
        if self.schedule is not None:
            add_regularization_gradient(self.model)
        self.optimizer.step()
        self.scheduler.step()
        if self.schedule is not None:
            self.schedule.step()
        self.optimizer.zero_grad()
