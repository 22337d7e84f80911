"""The phases of learning gates: warm-up without penalty, ramp, hold, and a phase with fixed gates."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum
from math import isfinite
from numbers import Integral
from typing import Any, Unpack

from torch import Tensor, nn

from rankbits.accounting.budget import Budget
from rankbits.errors import RankbitsWarning, ScheduleError
from rankbits.quant.quantizer import Quantizer
from rankbits.training.budget import (
    Allocation,
    BudgetController,
    BudgetLike,
    BudgetState,
    allocation_of,
    budgets_of,
)
from rankbits.training.objective import link_weights
from rankbits.training.processes import Reduction, agree
from rankbits.training.replay import Replay
from rankbits.training.weighting import Penalty, PenaltyOptions, PenaltyReduction, PenaltyWeighting
from rankbits.tuners.bayesian_lora import GatedLayer, GatePhase, gated_layers, learning_adapters, summarize
from rankbits.tuners.bayesian_lora.layer_gates import LayerGates

USUAL_LAMBDA = 1e-3
"""Weight of the penalties where there is no budget, unless one is given."""


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
        budget: what the hardened model may cost: a text such as "bops=0.25", "bytes=0.3", "bits=4" or "rank=2.5", a
            `Budget`, or several of them. The gates it presses are closed by a controller, and it is never exceeded.
        allocation: "evidence" chooses widths and ranks when the warm-up ends, by what closing each gate was measured to
            cost in its second half, and fixes them. "descent" closes gates one after another in the penalised steps,
            by what sampled gates feel. None is "evidence", and "descent" if a budget limits ranks.
        lambda_q: penalty per expected open width gate (weight of R_q); None is 0.001, or 0 under any budget.
        lambda_r: penalty per expected open rank (weight of R_r); None is 0.001, or 0 under any budget: idle gates close
            whatever the size of a penalty, and what no budget asks for need not be given up.
        phases: shares of the steps for (warm-up, ramp, fixed); what is left between ramp and fixed holds the full
            penalty. (0, 0, 0) is the letter of the paper.
        penalty: weighting="const", "bop" or "byte", what the bits of a quantizer count by; and reduction="sum" or
            "mean" over all width gates and all rank gates of the model.

    Raises:
        ScheduleError: the model has nothing to schedule, a number is out of its range, or a budget is not one, cannot
            be met, contradicts another or a lambda, leaves no penalty for what describes one, or has no steps to be met
            in. The model is unchanged.
    """

    GATE_BOUNDS = (-4.0, 8.0)
    """Logits are kept here: at -4 a closed gate is still sampled open in 8 % of the passes, and can return."""

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        budget: BudgetLike | None = None,
        allocation: str | None = None,
        lambda_q: float | None = None,
        lambda_r: float | None = None,
        phases: tuple[float, float, float] = (0.25, 0.25, 0.25),
        **penalty: Unpack[PenaltyOptions],
    ) -> None:
        _check_numbers(total_steps, lambda_q, lambda_r, phases)
        self.model = model
        self._layers = [layer for _, layer in gated_layers(model)]
        self.total_steps = total_steps
        self.warmup, self.ramp, self.fixed = phases
        self.completed_steps = 0
        if next(learning_adapters(model), None) is None:
            raise ScheduleError(
                "the model has no active Bayesian-LoRA adapter with gates to schedule: attach one with "
                "get_peft_model(model, BayesianLoraConfig(...)) and learn_bits or learn_rank on"
            )
        budgets = budgets_of(budget)
        self.allocation = allocation_of(allocation, budgets)
        self.controller = self._controller(budgets) if budgets else None
        self._given = {"lambda_q": lambda_q, "lambda_r": lambda_r}
        self._set_lambdas(lambda_q, lambda_r, Penalty(**penalty))
        self.replay = Replay(model, fixed_from=self.fixed_from, total_steps=total_steps)
        self._enter()
        self.replay.resume(0)

    def _controller(self, budgets: Sequence[Budget]) -> BudgetController:
        if self.allocation is Allocation.EVIDENCE:
            self._check_evidence(budgets)
        elif self.penalised_steps < 1:
            raise ScheduleError(
                f"budget {' and '.join(map(str, budgets))}: of {self.total_steps} steps {self.warmup_steps} are "
                f"warm-up and {self.total_steps - self.fixed_from} have fixed gates, which leaves none in which gates "
                "could close; expected phases (warm-up, ramp, fixed) that leave at least one"
            )
        start, end = self.warmup_steps, self.fixed_from
        return BudgetController(self.model, budgets, start=start, end=end, allocation=self.allocation)

    def _check_evidence(self, budgets: Sequence[Budget]) -> None:
        texts = " and ".join(map(str, budgets))
        if self.warmup_steps < 2:
            raise ScheduleError(
                f"budget {texts}: allocation='evidence' measures in the second half of the warm-up, which has "
                f"{self.warmup_steps} of {self.total_steps} steps; expected phases whose warm-up has at least 2"
            )

    def _set_lambdas(self, lambda_q: float | None, lambda_r: float | None, penalty: Penalty) -> None:
        controller = self.controller
        pressed = (False, False) if controller is None else (controller.presses_widths(), controller.presses_ranks())
        given = {"lambda_q": lambda_q, "lambda_r": lambda_r}
        for (name, value), is_pressed in zip(given.items(), pressed, strict=True):
            if value is not None and is_pressed and controller is not None:
                raise ScheduleError(
                    f"{name}: given {value:g} together with the budget {controller}, which presses the same gates; "
                    "expected one of them"
                )
        if controller is not None and self.allocation is Allocation.EVIDENCE:
            self._refuse_unfelt(given | {name: getattr(penalty, name) for name in ("weighting", "reduction")})
        chosen = [(USUAL_LAMBDA if controller is None else 0.0) if value is None else value for value in given.values()]
        bits, ranks = _gate_counts(self.model) if penalty.reduction is PenaltyReduction.MEAN else (1, 1)
        self.lambda_q, self.lambda_r = chosen[0] / max(bits, 1), chosen[1] / max(ranks, 1)
        adapters = list(learning_adapters(self.model))
        self.largest_macs = self.largest_stored = None
        if penalty.weighting is PenaltyWeighting.BOP:
            self.largest_macs = max([1, *(m for layer, name, _ in adapters for m in layer.macs_per_row(name))])
        if penalty.weighting is PenaltyWeighting.BYTE:
            self.largest_stored = max([1, *(n for layer, name, _ in adapters for n in layer.stored_numbers(name))])

    def _refuse_unfelt(self, given: dict[str, Any]) -> None:
        """Raise ScheduleError for what describes a penalty where none ever acts."""
        for name, value in given.items():
            usual = {"weighting": "const", "reduction": "sum"}.get(name, "0 or None")
            if value and value != usual:
                said = value.value if isinstance(value, Enum) else f"{value:g}"
                raise ScheduleError(
                    f"{name}: given {said}, but under the budget {self.controller} allocation='evidence' fixes all "
                    f"gates when the warm-up ends, before any penalty acts; expected {usual}, or allocation='descent'"
                )

    @property
    def warmup_steps(self) -> int:
        """Steps without penalty at the beginning."""
        return round(self.warmup * self.total_steps)

    @property
    def calibrated_at(self) -> int:
        """Completed steps at which calibration ends at the latest."""
        return self.warmup_steps // 2 if self.allocation is Allocation.EVIDENCE else self.warmup_steps

    @property
    def fixed_from(self) -> int:
        """First step, counted from 0, with fixed gates; `total_steps` if there is none.

        Gates that were chosen by evidence are fixed from then on: sampling could only make them noisy.
        """
        if self.allocation is Allocation.EVIDENCE:
            return self.warmup_steps
        return self.total_steps - round(self.fixed * self.total_steps)

    @property
    def penalised_steps(self) -> int:
        """Number of steps of the ramp and hold phases together."""
        return max(self.fixed_from - self.warmup_steps, 0)

    def phase(self) -> GatePhase:
        """What holds for the next optimizer step."""
        share = penalty_fraction(self.completed_steps / self.total_steps, warmup=self.warmup, ramp=self.ramp)
        fixed = self.fixed_from < self.total_steps and self.completed_steps >= self.fixed_from
        return GatePhase(
            lambda_q=0.0 if fixed else share * self.lambda_q,
            lambda_r=0.0 if fixed else share * self.lambda_r,
            fixed=fixed,
            largest_macs=self.largest_macs,
            largest_stored=self.largest_stored,
            stands=not fixed and self.penalised_steps == 0,
            measures=self.controller is not None and self.controller.measures(self.completed_steps),
            completed=self.completed_steps == self.total_steps,
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
        for layer, name, gates in self._adapters():
            if self.completed_steps == 1 and self.fixed_from > 0:
                # Not in the constructor: a run that is resumed there has loaded what it fitted.
                layer.forget_rounding(name)
            gates.clamp(*self.GATE_BOUNDS)
            if self.completed_steps <= self.warmup_steps:
                layer.cover_weights(name)
            if self.completed_steps == self.calibrated_at:
                # From here on gates are judged: a quantizer that still only records could not defend its bits.
                layer.finish_calibration(name)
        self._share_ranges()
        self.replay.look_ahead(self.completed_steps)
        if self.controller is not None:
            self.controller.advance(self.completed_steps)
        if self.completed_steps == self.fixed_from:
            self._warn_if_all_closed()
        self._enter()
        self.replay.advance(self.completed_steps)

    def budgets(self) -> list[BudgetState]:
        """Where each budget stands now; none if there is no budget."""
        return [] if self.controller is None else self.controller.states(self.completed_steps)

    def restore(self, completed_steps: int) -> None:
        """Continue after this many completed steps, as if they had been made here.

        Raises:
            ScheduleError: there are fewer steps, or a budget should have been met by then and is not.
        """
        if not 0 <= completed_steps <= self.total_steps:
            raise ScheduleError(f"completed_steps must be in [0, {self.total_steps}], got {completed_steps}")
        if self.controller is not None:
            self.controller.refuse_undecided(completed_steps)
            self.controller.resume()
        self.completed_steps = completed_steps
        self._enter()
        self.replay.resume(completed_steps)

    def _enter(self) -> None:
        phase = self.phase()
        pressure = None if self.controller is None or phase.fixed else self.controller.pressure(self.completed_steps)
        pressures = {}
        if self.controller is not None and pressure is not None:
            parts = self.controller.table.per_layer(*pressure)
            pressures = {(id(layer), name): (widths, ranks) for layer, name, widths, ranks in parts}
        for layer, name, _ in self._adapters():
            layer.set_phase(name, replace(phase, pressure=pressures.get((id(layer), name))), self.completed_steps)

    def _share_ranges(self) -> None:
        """Let ranges that each process widened to the largest magnitudes of its own rows begin alike."""
        if self.penalised_steps == 0 and self.completed_steps == self.fixed_from:
            quantizers = [q for layer, name, _ in self._adapters() for q in layer.quantizers_of(name).values()]
            agree([q.log_range for q in quantizers if isinstance(q, Quantizer)], Reduction.MAXIMUM)

    def _adapters(self) -> Iterator[tuple[GatedLayer, str, LayerGates]]:
        """What `learning_adapters` finds, without a walk through the whole model at each step."""
        for layer in self._layers:
            for name in layer.active_adapters:
                gates = layer.gates_of(name)
                if gates is not None:
                    yield layer, name, gates

    def _warn_if_all_closed(self) -> None:
        """Say so if a lambda that the user gave has closed every gate of its kind."""
        names = {name for _, name, _ in learning_adapters(self.model)}
        summaries = [summary for name in sorted(names) for summary in summarize(self.model, name)]
        widths = self._priced_widths()
        ranks = [(summary.rank, summary.max_rank) for summary in summaries if summary.expected_rank is not None]
        closed = (bool(widths) and max(widths) == 2, any(most > 1 for _, most in ranks) and max(ranks)[0] == 1)
        half = max((most for _, most in ranks), default=2) / 2
        causes = {
            "lambda_q": ("all quantizers are at 2 bits", "bits=4"),
            "lambda_r": ("all layers are at rank 1", f"rank={half:g}"),
        }
        for (name, (what, form)), is_closed in zip(causes.items(), closed, strict=True):
            given = self._given[name]
            if given and is_closed:
                warnings.warn(
                    f"{what} at the end of the gate phase: {name}={given:g} has closed every gate, whatever the data "
                    f'said. Give a budget instead, such as GateSchedule(model, total_steps, budget="{form}")',
                    RankbitsWarning,
                    stacklevel=3,
                )

    def _priced_widths(self) -> list[int]:
        """The width of each quantizer that a penalty by size has a price for; of all if it has one price for all."""
        widths: list[int] = []
        for layer, name, gates in self._adapters():
            if gates.bit_logits is None:
                continue
            found = 2 << gates.values(hard=True).widths.sum(dim=1).cpu()  # [sites]; each open gate doubles two bits
            weights = link_weights(layer, name, self.phase())
            widths += (found[weights[:, 0] > 0] if isinstance(weights, Tensor) else found).tolist()
        return widths

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, ready for JSON; everything else follows from the constructor."""
        state = {"completed_steps": self.completed_steps, "total_steps": self.total_steps, **self._plan()}
        if self.controller is not None:
            state["budget"] = self.controller.state_dict()
        return state | self.replay.state_dict()

    def _plan(self) -> dict[str, Any]:
        """When gates move, and how they are chosen."""
        return {"phases": [self.warmup, self.ramp, self.fixed], "allocation": self.allocation.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, with the model's weights loaded before.

        Raises:
            ScheduleError: it was made for another number of steps or other phases, or under another budget.
        """
        if state["total_steps"] != self.total_steps:
            raise ScheduleError(
                f"the checkpoint's gate schedule was made for {state['total_steps']} steps, this one for "
                f"{self.total_steps}"
            )
        saved = state.get("budget")
        if (saved is None) != (self.controller is None):
            given = "none" if self.controller is None else str(self.controller)
            raise ScheduleError(f"the checkpoint's budgets are {(saved or {}).get('budgets')}, this schedule's {given}")
        mine = self._plan()
        # Older checkpoints do not have them.
        theirs = {key: state.get(key, value) for key, value in mine.items()}
        if theirs != mine:
            raise ScheduleError(f"the checkpoint's gate schedule has {theirs}, this one {mine}")
        if self.controller is not None and saved is not None:
            self.controller.load_state_dict(saved)
        self.replay.load_state_dict(state)
        self.restore(state["completed_steps"])


def _check_numbers(total_steps: Any, lambda_q: float | None, lambda_r: float | None, phases: Sequence[float]) -> None:
    problems = []
    if isinstance(total_steps, bool) or not isinstance(total_steps, Integral) or total_steps < 1:
        problems.append(f"total_steps must be a whole number >= 1, got {total_steps!r}")
    if not all(value is None or (value >= 0 and isfinite(value)) for value in (lambda_q, lambda_r)):
        problems.append(f"lambda_q and lambda_r must be >= 0, got {lambda_q} and {lambda_r}")
    if len(phases) != 3 or not all(share >= 0.0 for share in phases) or not sum(phases) <= 1.0 + 1e-9:
        problems.append(f"phases (warm-up, ramp, fixed) must be three shares >= 0 with a sum <= 1, got {phases}")
    if problems:
        raise ScheduleError("GateSchedule: " + "; ".join(problems))


def _gate_counts(model: nn.Module) -> tuple[int, int]:
    """(width gates, rank gates) of the model."""
    bits = ranks = 0
    for _, _, gates in learning_adapters(model):
        bits += 0 if gates.bit_logits is None else gates.bit_logits.numel()
        ranks += 0 if gates.rank_logits is None else gates.rank_logits.numel()
    return bits, ranks
