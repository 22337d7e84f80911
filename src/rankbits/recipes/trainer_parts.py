"""What a method brings to the Trainer besides its adapters: callbacks, and an optimizer where it needs its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from rankbits.errors import RecipeError, ScheduleError
from rankbits.recipes.budgets import budgets_of
from rankbits.recipes.schema import Recipe
from rankbits.training.adalora_callback import AdaloraCallback
from rankbits.training.adalora_schedule import AdaloraSchedule
from rankbits.training.callback import RankbitsCallback
from rankbits.training.groups import GateRates, optimizer_and_scheduler
from rankbits.training.rank_callback import DyloraCallback
from rankbits.training.schedule import GateSchedule
from rankbits.tuners.bayesian_lora import learning_adapters


@dataclass(frozen=True)
class TrainerParts:
    """What one method asks of the Trainer.

    Args:
        callbacks: the Trainer calls them in this order, before all others.
        optimizers: optimizer and scheduler, or None for the Trainer's own.
    """

    callbacks: tuple[TrainerCallback, ...] = ()
    optimizers: tuple[Any, Any] | None = None


def learned_gates(recipe: Recipe, model: PeftModel, total_steps: int) -> TrainerParts:
    """The gate schedule and its optimizer, if anything has gates.

    Raises:
        RecipeError: the budget or the lambdas do not suit the model or the run.
    """
    if next(learning_adapters(model), None) is None:
        return TrainerParts()
    schedule = gate_schedule(recipe, model, total_steps)
    return TrainerParts((RankbitsCallback(schedule),), _gate_optimizers(recipe, schedule))


def drawn_ranks(_recipe: Recipe, _model: PeftModel, _total_steps: int) -> TrainerParts:
    """What draws the rank of every step of DyLoRA."""
    return TrainerParts((DyloraCallback(),))


def allocated_ranks(recipe: Recipe, model: PeftModel, total_steps: int) -> TrainerParts:
    """What moves AdaLoRA's ranks. RecipeError if its phases do not suit the run."""
    own = recipe.adapter.adalora
    try:
        schedule = AdaloraSchedule(model, total_steps, phases=(own.warmup, own.final), orthogonality=own.orthogonality)
    except ScheduleError as reason:
        raise RecipeError(f"adapter.adalora: {reason}") from reason
    return TrainerParts((AdaloraCallback(schedule),))


def gate_schedule(recipe: Recipe, model: PeftModel, total_steps: int) -> GateSchedule:
    """The gate schedule of a recipe. RecipeError if its budget or lambdas do not suit the model or the run."""
    gates = recipe.gates
    try:
        return GateSchedule(
            model,
            total_steps,
            budget=budgets_of(recipe) or None,
            allocation=gates.allocation,
            lambda_q=gates.lambda_q,
            lambda_r=gates.lambda_r,
            phases=(gates.warmup, gates.ramp, gates.fixed),
            weighting=gates.weighting,
            reduction=gates.reduction,
        )
    except ScheduleError as reason:
        raise RecipeError(f"gates: {reason}") from reason


def _gate_optimizers(recipe: Recipe, schedule: GateSchedule) -> tuple[Any, Any]:
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
