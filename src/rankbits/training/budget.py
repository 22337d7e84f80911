"""The budget controller: closes gates one after another until the model that is delivered costs what was allowed.

Dual ascent on J = L + sum_k mu_k (C_k / C_k* - 1), where the constraint is what thresholded gates cost and three things
keep it from collapsing. Only the top open gate of each chain feels the penalty, with what it alone saves: the gradient
of the expected cost is largest at the lowest gate, which carries all higher ones, so that whole chains would close
together. The penalty acts only while the cost is above a target that descends to the budget: an optimizer that
normalises gradients closes idle gates at its own rate whatever mu, and would overshoot. And a gate that becomes the top
one starts from a logit at which it is sampled closed now and then, since a saturated gate has no data gradient with
which to defend itself. At the end the budget is enforced exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from rankbits.accounting.budget import Budget, Quantity, parse_budget
from rankbits.errors import RecipeError, ScheduleError
from rankbits.gates.hard_concrete import OPEN_LOGIT
from rankbits.training.cost_terms import Amounts, delivered, expected
from rankbits.training.enforcement import enforce
from rankbits.training.evidence import decide, posterior_evidence
from rankbits.training.gate_table import GateLogits, GateTable, PerGate
from rankbits.training.model_cost import ModelCost
from rankbits.training.reach import refuse_unreachable

CONTESTED = 1.5
"""Logit of a gate when it becomes the top one: sampled closed in 4 % of the passes, with a data gradient in 48 %."""
CLOSED = -2.5
"""Logit of a gate that has just closed: sampled open in 29 % of the passes, so that it can return."""
REOPENED = OPEN_LOGIT + 0.7
"""Logit of a gate that has just returned."""
DESCENT = 0.8
"""Share of the penalised steps in which the target descends to the budget."""
IDLE_DESCENT = 0.25
"""Share of the descent for the gates of 32 and 16 bits, which the data hardly notices."""
FIRST_PRESSURE = 1e-3
"""Dual variable at the end of the warm-up."""
GROWTH = 14.0
"""A dual variable can grow by this many e-folds within the penalised steps."""
TOLERANCE = 0.05
"""Relative distance from the target at which a dual variable changes at its full rate."""


class Allocation(str, Enum):
    """How gates are chosen under a budget."""

    DESCENT = "descent"
    """One after another while the cost descends, by what sampled gates feel."""
    EVIDENCE = "evidence"
    """At once when the warm-up ends, by what closing each gate was measured to cost."""


BudgetLike = str | Budget | Sequence[str | Budget]


@dataclass(frozen=True)
class BudgetState:
    """Where one budget stands, for logs.

    Args:
        budget: what is allowed.
        cost: of what would be delivered now.
        expected: cost under the gate probabilities.
        target: what the cost should have come down to by now.
        mu: weight of its penalty.
    """

    budget: Budget
    cost: float
    expected: float
    target: float
    mu: float


def allocation_of(name: str | None, budgets: Sequence[Budget]) -> Allocation:
    """The allocation of a name, or the one that suits the budgets; ScheduleError for an unknown name."""
    known = [member.value for member in Allocation]
    if name is not None and name not in known:
        raise ScheduleError(f"allocation: given {name!r}, expected one of {', '.join(known)}")
    if not budgets:
        if name == Allocation.EVIDENCE.value:
            raise ScheduleError(f"allocation: given {name!r} without a budget, by which alone it can choose")
        return Allocation.DESCENT
    ranks = any(budget.quantity is Quantity.RANK for budget in budgets)
    return Allocation(name or (Allocation.DESCENT if ranks else Allocation.EVIDENCE))


def budgets_of(given: BudgetLike | None) -> tuple[Budget, ...]:
    """The budgets that a text, a budget or several of them name. ScheduleError for anything else."""
    if given is None:
        return ()
    listed: list[Any] = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for entry in listed or [given]:
        if not isinstance(entry, (str, Budget)):
            raise ScheduleError(f"budget: given {entry!r}, expected a text such as 'bits=4', or a rankbits.Budget")
    try:
        budgets = tuple(parse_budget(entry) if isinstance(entry, str) else entry for entry in listed)
    except RecipeError as reason:
        raise ScheduleError(str(reason)) from reason
    for budget in budgets:
        same = [other for other in budgets if other.quantity is budget.quantity]
        if len(same) > 1:
            raise ScheduleError(f"budget: given {' and '.join(map(str, same))}; expected one of each quantity")
    return budgets


class BudgetController:
    """Closes the gates of a model under its budgets, between two optimizer steps.

    Args:
        model: a model with Bayesian-LoRA adapters that have gates.
        budgets: what is allowed, at most one of each quantity.
        start: completed steps at which gates begin to feel the budgets.
        end: completed steps at which the budgets are enforced; the last before the fixed phase.
        allocation: how gates are chosen; by evidence, it is measured in the second half of the steps before `start`.

    Raises:
        ScheduleError: a budget cannot be counted, or cannot be met.
    """

    def __init__(
        self,
        model: nn.Module,
        budgets: Sequence[Budget],
        *,
        start: int,
        end: int,
        allocation: Allocation = Allocation.DESCENT,
    ) -> None:
        self.table = GateTable(model)
        self.budgets = tuple(budgets)
        self.start, self.end, self.allocation = start, end, allocation
        pricing = ModelCost(model, self.table)
        self.costs = [pricing.cost(budget) for budget in self.budgets]
        self.mu = [FIRST_PRESSURE] * len(self.budgets)
        self.corners: list[tuple[float, float]] | None = None
        self._logits = self.table.read()
        refuse_unreachable(self.table, self.budgets, self.costs, pricing)
        # What an earlier schedule measured was another state of the model.
        self.table.forget_evidence()

    def __str__(self) -> str:
        """The budgets as texts."""
        return " and ".join(map(str, self.budgets))

    def presses_widths(self) -> bool:
        """Whether some budget presses width gates."""
        amounts = self._amounts(self._logits)
        return any(bool((cost.width_savings(amounts) > 0.0).any()) for cost in self.costs)

    def presses_ranks(self) -> bool:
        """Whether some budget presses rank gates."""
        amounts = self._amounts(self._logits)
        return any(bool((cost.rank_savings(amounts) > 0.0).any()) for cost in self.costs)

    def advance(self, completed_steps: int) -> None:
        """Move the dual variables and the logits after an optimizer step; enforce the budgets after the last one."""
        if self.measures(completed_steps - 1):
            self.table.share_evidence()
        if not self.start <= completed_steps <= self.end:
            return
        logits = self.table.read()
        if completed_steps == self.start and self.allocation is Allocation.EVIDENCE:
            limits = [budget.limit for budget in self.budgets]
            evidence = posterior_evidence(self.table.evidence(), self.table.sites())
            self._replace(logits, decide(logits, evidence, self.costs, limits))
            return
        if completed_steps == self.end:
            self._replace(logits, enforce(logits, self.costs, [budget.limit for budget in self.budgets]))
            return
        amounts = self._amounts(logits)
        if self.corners is None:
            self.corners = self._corners(logits)
        settled = self._settled(logits)
        pressed_widths, pressed_ranks = self._savings(self._amounts(settled), completed_steps)
        for index, cost in enumerate(self.costs):
            excess = cost.hard(amounts) / self.target(index, completed_steps) - 1.0
            rate = GROWTH / max(self.end - self.start, 1)
            self.mu[index] *= math.exp(rate * min(max(excess / TOLERANCE, -1.0), 1.0))
        self._replace(logits, _contested(settled, pressed_widths > 0.0, pressed_ranks > 0.0))

    def measures(self, completed_steps: int) -> bool:
        """Whether the next step measures what closing gates would cost."""
        return self.allocation is Allocation.EVIDENCE and self.start // 2 <= completed_steps < self.start

    def pressure(self, completed_steps: int) -> tuple[Tensor, Tensor] | None:
        """Weight of the probability of each gate in the penalty of the next step.

        Returns:
            [quantizers, 4] and [layers, r - 1] float32, zero but for top open gates; None while nothing is pressed.
        """
        if self.corners is None or not self.start <= completed_steps < self.end:
            return None
        logits = self._logits
        widths, ranks = self._savings(self._amounts(logits), completed_steps)
        if not bool((widths > 0.0).any()) and not bool((ranks > 0.0).any()):
            return None
        open_widths, open_ranks = self._chains(logits)
        return _at_top(widths, open_widths, logits.widths), _at_top(ranks, open_ranks, logits.ranks)

    def target(self, index: int, completed_steps: int) -> float:
        """What the cost of a budget should have come down to after so many steps: geometric, idle gates first."""
        limit = self.budgets[index].limit
        if self.corners is None:
            return limit
        first, middle = (max(corner, limit) for corner in self.corners[index])
        progress = (completed_steps - self.start) / max(DESCENT * (self.end - self.start), 1.0)
        turn = IDLE_DESCENT if middle < first else 0.0
        if progress >= 1.0:
            return limit
        if progress < turn:
            return float(first * (middle / first) ** (progress / turn))
        return float(middle * (limit / middle) ** ((progress - turn) / (1.0 - turn)))

    def states(self, completed_steps: int) -> list[BudgetState]:
        """Where each budget stands; of a model that was hardened since, where it stood at last."""
        logits = self.table.read() if self.table.is_whole() else self._logits
        hard = self._amounts(logits)
        soft = expected(logits.width_probabilities(), logits.rank_probabilities())
        return [
            BudgetState(
                budget,
                cost.hard(hard),
                float(cost.soft(soft)),
                self.target(index, completed_steps),
                0.0 if completed_steps < self.start or completed_steps >= self.end else self.mu[index],
            )
            for index, (budget, cost) in enumerate(zip(self.budgets, self.costs, strict=True))
        ]

    def state_dict(self) -> dict[str, Any]:
        """What cannot be worked out from the model: dual variables and where the descent began."""
        corners = None if self.corners is None else [list(pair) for pair in self.corners]
        state = {"budgets": list(map(_terms, self.budgets)), "mu": list(self.mu), "corners": corners}
        if self.allocation is Allocation.EVIDENCE:
            measured = self.table.evidence()
            state["evidence"] = {"widths": measured.widths.tolist(), "ranks": measured.ranks.clamp(min=0.0).tolist()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. ScheduleError if it is of other budgets."""
        mine = list(map(_terms, self.budgets))
        # Older checkpoints have the limits alone.
        if state["budgets"] not in (mine, list(map(str, self.budgets))):
            raise ScheduleError(f"the checkpoint's budgets are {state['budgets']}, those of this schedule {mine}")
        self.mu = [float(mu) for mu in state["mu"]]
        if "evidence" in state:
            measured = state["evidence"]
            self.table.set_evidence(PerGate(torch.tensor(measured["widths"]), torch.tensor(measured["ranks"])))
        corners = state["corners"]
        self.corners = None if corners is None else [(float(first), float(middle)) for first, middle in corners]
        self.resume()

    def resume(self) -> None:
        """Take the gates as they are now for those after the last step."""
        self._logits = self.table.read()

    def refuse_undecided(self, completed_steps: int) -> None:
        """Raise ScheduleError if gates should have been closed by now and were not: nothing would close them later."""
        chosen_at = self.start if self.allocation is Allocation.EVIDENCE else self.end
        if completed_steps < chosen_at:
            return
        for state in self.states(completed_steps):
            if state.cost > state.budget.limit:
                raise ScheduleError(
                    f"budget {state.budget}: after {completed_steps} steps the gates cost {state.cost:.4g}, though "
                    f"this schedule was to choose them at step {chosen_at}: they were trained without it, or with "
                    "other phases; expected those of the run that is resumed, or a new beginning"
                )

    def _replace(self, before: GateLogits, after: GateLogits) -> None:
        self.table.write(before, after)
        self._logits = after

    def _chains(self, logits: GateLogits) -> tuple[Tensor, Tensor]:
        return logits.open_widths(), logits.open_ranks()

    def _amounts(self, logits: GateLogits) -> Amounts:
        return delivered(*self._chains(logits))

    def _savings(self, amounts: Amounts, completed_steps: int) -> tuple[Tensor, Tensor]:
        """What closing each top gate saves, weighted over the budgets that are above their targets."""
        widths, ranks = torch.zeros_like(amounts.widths[:-1]), torch.zeros_like(amounts.ranks[:-1])
        for index, (cost, budget) in enumerate(zip(self.costs, self.budgets, strict=True)):
            if cost.hard(amounts) > self.target(index, completed_steps):
                scale = self.mu[index] / budget.limit
                widths += scale * cost.width_savings(amounts).clamp(min=0.0)
                ranks += scale * cost.rank_savings(amounts).clamp(min=0.0)
        return widths * (amounts.widths[:-1] > 2.0), ranks * (amounts.ranks[:-1] > 1.0)

    def _corners(self, logits: GateLogits) -> list[tuple[float, float]]:
        """Costs now, and with nothing above 8 bits."""
        widths, ranks = self._chains(logits)
        now, narrow = delivered(widths, ranks), delivered(widths.clamp(max=2), ranks)
        return [(cost.hard(now), cost.hard(narrow)) for cost in self.costs]

    def _settled(self, logits: GateLogits) -> GateLogits:
        """Logits with those that have just crossed their threshold taken clear of it."""
        widths, ranks = logits.widths.clone(), logits.ranks.clone()
        for values, now, before in zip((widths, ranks), self._chains(logits), self._chains(self._logits), strict=True):
            for row in torch.nonzero(now < before).flatten().tolist():
                values[row, now[row] : before[row]] = values[row, now[row] : before[row]].clamp(max=CLOSED)
            for row in torch.nonzero(now > before).flatten().tolist():
                values[row, before[row] : now[row]] = values[row, before[row] : now[row]].clamp(min=REOPENED)
        return GateLogits(widths, ranks, logits.straight)


def _terms(budget: Budget) -> str:
    """A budget with all that it is counted by."""
    if budget.quantity in {Quantity.BITS, Quantity.RANK}:
        return str(budget)
    text = f"{budget} at {budget.reference_bits} bits"
    if budget.quantity is Quantity.BYTES:
        return text
    tokens = "" if budget.sequence_length is None else f", {budget.sequence_length} tokens"
    return f"{text}, {budget.scope.value}{tokens}"


def _at_top(values: Tensor, open_gates: Tensor, like: Tensor) -> Tensor:
    """Place a value per chain at its last open gate: [chains] and [chains] to the shape of `like`."""
    placed = torch.zeros_like(like)
    rows = torch.nonzero(open_gates > 0).flatten()
    placed[rows, open_gates[rows] - 1] = values[rows].to(placed.dtype)
    return placed


def _contested(logits: GateLogits, widths: Tensor, ranks: Tensor) -> GateLogits:
    """Logits with the top gates of pressed chains lowered to where the data can contest their closing."""
    lowered = []
    for values, pressed, open_gates in (
        (logits.widths, widths, logits.open_widths()),
        (logits.ranks, ranks, logits.open_ranks()),
    ):
        top = _at_top(pressed.to(values.dtype), open_gates, values) > 0.0
        lowered.append(torch.where(top, values.clamp(max=CONTESTED), values))
    return GateLogits(lowered[0], lowered[1], logits.straight)
