"""What budgets a model can meet at all: refused before training, with the interval that can be reached."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rankbits.accounting.budget import Budget, Quantity
from rankbits.errors import ScheduleError
from rankbits.training.cost_terms import Amounts, Cost, delivered
from rankbits.training.gate_table import WIDTH_GATES, GateTable
from rankbits.training.model_cost import ModelCost
from rankbits.tuners.bayesian_lora.config import Site


def refuse_unreachable(table: GateTable, budgets: Sequence[Budget], costs: Sequence[Cost], pricing: ModelCost) -> None:
    """Raise ScheduleError, naming all budgets that the gates of a model cannot meet and what they can.

    Args:
        table: the gates of the model.
        budgets: what is allowed.
        costs: what each budget limits.
        pricing: which quantizers the model has.
    """
    problems = [problem for budget in budgets for problem in _without_gates(budget, table)]
    if not problems:
        corners = _corners(table)
        for budget, cost in zip(budgets, costs, strict=True):
            problems += _out_of_reach(budget, cost, corners, inputs=pricing.learns(Site.INPUT))
        if not problems and not any(_all_met(budgets, costs, corner) for corner in corners[:2]):
            both = " and ".join(map(str, budgets))
            problems.append(f"{both}: each can be met alone, but no ranks and widths meet all of them")
    if problems:
        raise ScheduleError("budget " + "; ".join(problems))


def _without_gates(budget: Budget, table: GateTable) -> list[str]:
    if budget.quantity is Quantity.RANK and not table.rank_rows:
        return [f"{budget}: the model has no rank gates to meet it with; expected learn_rank=True and r of at least 2"]
    if budget.quantity is not Quantity.RANK and not table.width_rows:
        return [f"{budget}: the model has no quantizers, so no widths that could meet it; expected learn_bits=True"]
    return []


def _corners(table: GateTable) -> tuple[Amounts, Amounts, Amounts]:
    """Two bits at rank 1, two bits at full rank, and everything open."""
    none, most = torch.zeros(table.width_rows, dtype=torch.int64), torch.full((table.width_rows,), WIDTH_GATES)
    ranks = table.read().ranks.isfinite().sum(dim=1)
    return delivered(none, torch.zeros_like(ranks)), delivered(none, ranks), delivered(most, ranks)


def _out_of_reach(budget: Budget, cost: Cost, corners: tuple[Amounts, Amounts, Amounts], *, inputs: bool) -> list[str]:
    # A mean over weights can rise when a layer gives up narrow ones.
    low, high = min(cost.hard(corner) for corner in corners[:2]), cost.hard(corners[2])
    if low <= budget.limit <= high:
        return []
    advice = ""
    if budget.limit < low and budget.quantity is Quantity.BOPS and not inputs:
        advice = '. No input has a quantizer, so each counts 32 bits: add "input" to quantizers'
    return [
        f"{budget} cannot be met: with 2 bits and rank 1 everywhere it is {low:.4g}, with all gates open {high:.4g}; "
        f"expected a limit between them{advice}"
    ]


def _all_met(budgets: Sequence[Budget], costs: Sequence[Cost], corner: Amounts) -> bool:
    return all(cost.hard(corner) <= budget.limit for budget, cost in zip(budgets, costs, strict=True))
