"""The phases of learning gates: warm-up without penalty, ramp, hold, and a phase with fixed gates."""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import nn

from rankbits.errors import ScheduleError
from rankbits.tuners.bayesian_lora import GatePhase, learning_adapters


class PenaltyWeighting(str, Enum):
    """What a bit of a quantizer costs: the same everywhere, or its share of the bit operations."""

    CONST = "const"
    BOP = "bop"


class PenaltyReduction(str, Enum):
    """Whether the penalties add up over all quantizers and layers (the paper) or are averaged."""

    SUM = "sum"
    MEAN = "mean"


def penalty_fraction(progress: float, *, warmup: float, ramp: float) -> float:
    """Share of the full penalty at a moment of training, between 0 and 1.

    Args:
        progress: completed optimizer steps over all steps, in [0, 1].
        warmup: share of the steps without penalty.
        ramp: share of the steps after it in which the penalty grows linearly.
    """
    if progress < warmup:
        return 0.0
    return 1.0 if ramp == 0.0 else min(1.0, (progress - warmup) / ramp)


class GateSchedule:
    """Moves the gates of a model through their phases; a function of the completed optimizer steps.

    Args:
        model: a model with at least one active Bayesian-LoRA adapter that has gates.
        total_steps: optimizer steps of the whole training.
        lambda_q: penalty per expected open width gate (weight of R_q).
        lambda_r: penalty per expected open rank (weight of R_r).
        phases: shares of the steps for (warm-up, ramp, fixed); what is left between ramp and fixed holds the full
            penalty. (0, 0, 0) is the letter of the paper.
        weighting: "const" or "bop".
        reduction: "sum" or "mean" over all width gates and all rank gates of the model.

    Raises:
        ScheduleError: the model has nothing to schedule, or a number is out of its range.
    """

    GATE_BOUNDS = (-4.0, 8.0)
    """Logits are kept here: at -4 a closed gate is still sampled open in 8 % of the passes, and can return."""

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        lambda_q: float = 1e-3,
        lambda_r: float = 1e-3,
        phases: tuple[float, float, float] = (0.25, 0.25, 0.25),
        weighting: str = "const",
        reduction: str = "sum",
    ) -> None:
        _check_numbers(total_steps, lambda_q, lambda_r, phases)
        self.model = model
        self.total_steps = total_steps
        self.warmup, self.ramp, self.fixed = phases
        self.completed_steps = 0
        adapters = list(learning_adapters(model))
        if not adapters:
            raise ScheduleError(
                "the model has no active Bayesian-LoRA adapter with gates to schedule: attach one with "
                "get_peft_model(model, BayesianLoraConfig(...)) and learn_bits or learn_rank on"
            )
        bits, ranks = _gate_counts(model) if PenaltyReduction(reduction) is PenaltyReduction.MEAN else (1, 1)
        self.lambda_q, self.lambda_r = lambda_q / max(bits, 1), lambda_r / max(ranks, 1)
        self.largest_macs = None
        if PenaltyWeighting(weighting) is PenaltyWeighting.BOP:
            self.largest_macs = max([1, *(m for layer, name, _ in adapters for m in layer.macs_per_row(name))])
        self._enter()

    @property
    def warmup_steps(self) -> int:
        """Steps without penalty at the beginning."""
        return round(self.warmup * self.total_steps)

    @property
    def fixed_from(self) -> int:
        """First step, counted from 0, with fixed gates; `total_steps` if there is none."""
        return self.total_steps - round(self.fixed * self.total_steps)

    @property
    def penalised_steps(self) -> int:
        """Number of steps of the ramp and hold phases together."""
        return max(self.fixed_from - self.warmup_steps, 0)

    def phase(self) -> GatePhase:
        """What holds for the next optimizer step."""
        share = penalty_fraction(self.completed_steps / self.total_steps, warmup=self.warmup, ramp=self.ramp)
        fixed = self.fixed > 0.0 and self.completed_steps >= self.fixed_from
        return GatePhase(
            lambda_q=0.0 if fixed else share * self.lambda_q,
            lambda_r=0.0 if fixed else share * self.lambda_r,
            fixed=fixed,
            largest_macs=self.largest_macs,
        )

    def step(self) -> None:
        """Tell the schedule that an optimizer step was made.

        Raises:
            ScheduleError: more steps than the schedule was made for.
        """
        if self.completed_steps >= self.total_steps:
            raise ScheduleError(
                f"the gate schedule was made for {self.total_steps} optimizer steps and is stepped once more: "
                "give it the number of optimizer steps, not of micro-batches or epochs"
            )
        self.completed_steps += 1
        for layer, name, gates in learning_adapters(self.model):
            gates.clamp(*self.GATE_BOUNDS)
            if self.completed_steps <= self.warmup_steps:
                layer.cover_weights(name)
            if self.completed_steps == self.warmup_steps:
                # From here on gates are penalised: a quantizer that still only records could not defend its bits.
                layer.finish_calibration(name)
        self._enter()

    def restore(self, completed_steps: int) -> None:
        """Continue after this many completed steps, as if they had been made here."""
        if not 0 <= completed_steps <= self.total_steps:
            raise ScheduleError(f"completed_steps must be in [0, {self.total_steps}], got {completed_steps}")
        self.completed_steps = completed_steps
        self._enter()

    def _enter(self) -> None:
        phase = self.phase()
        for layer, name, _ in learning_adapters(self.model):
            layer.set_phase(name, phase, self.completed_steps)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of a hand-written loop needs; everything else follows from the constructor."""
        return {"completed_steps": self.completed_steps, "total_steps": self.total_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. ScheduleError if it was made for another number of steps."""
        if state["total_steps"] != self.total_steps:
            raise ScheduleError(
                f"the checkpoint's gate schedule was made for {state['total_steps']} steps, this one for "
                f"{self.total_steps}"
            )
        self.restore(state["completed_steps"])


def _check_numbers(total_steps: int, lambda_q: float, lambda_r: float, phases: tuple[float, float, float]) -> None:
    problems = []
    if total_steps < 1:
        problems.append(f"total_steps must be >= 1, got {total_steps}")
    if lambda_q < 0 or lambda_r < 0:
        problems.append(f"lambda_q and lambda_r must be >= 0, got {lambda_q} and {lambda_r}")
    if min(phases) < 0 or sum(phases) > 1.0 + 1e-9:
        problems.append(f"phases (warm-up, ramp, fixed) must be >= 0 with a sum <= 1, got {phases}")
    if problems:
        raise ScheduleError("GateSchedule: " + "; ".join(problems))


def _gate_counts(model: nn.Module) -> tuple[int, int]:
    """(width gates, rank gates) of the model."""
    bits = ranks = 0
    for _, _, gates in learning_adapters(model):
        bits += 0 if gates.bit_logits is None else gates.bit_logits.numel()
        ranks += 0 if gates.rank_logits is None else gates.rank_logits.numel()
    return bits, ranks
