"""What budgets a model can meet at all: refused before training, with the interval that can be reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rankbits.accounting.budget import Budget, Quantity
from rankbits.errors import ScheduleError
from rankbits.training.cost_terms import Amounts, Cost, delivered
from rankbits.training.enforcement import fit
from rankbits.training.gate_table import WIDTH_GATES, GateTable, PerGate
from rankbits.training.model_cost import ModelCost
from rankbits.training.open_gates import OpenGates
from rankbits.tuners.bayesian_lora.config import Site

NEARLY = 1.1
"""What is left of one budget by another is found gate by gate, and may be a little more than it seems."""


def refuse_unreachable(table: GateTable, budgets: Sequence[Budget], costs: Sequence[Cost], pricing: ModelCost) -> None:
    """Raise ScheduleError, naming all budgets that the gates of a model cannot meet and what they can.

    Args:
        table: the gates of the model.
        budgets: what is allowed.
        costs: what each budget limits.
        pricing: which quantizers the model has.
    """
    kept = pricing.kept_widths()
    problems = [problem for budget in budgets for problem in _without_gates(budget, table, kept)]
    if not problems:
        corners = _corners(table)
        for budget, cost in zip(budgets, costs, strict=True):
            problems += _out_of_reach(budget, cost, corners, inputs=pricing.learns(Site.INPUT), kept=kept)
        if not problems and not any(_all_met(budgets, costs, corner) for corner in corners[:2]):
            both = " and ".join(map(str, budgets))
            problems.append(f"{both}: each can be met alone, but no ranks and widths meet all of them")
        if not problems:
            problems = list(_without_effect(budgets, costs, table))
    if problems:
        raise ScheduleError("budget " + "; ".join(problems))


def _without_gates(budget: Budget, table: GateTable, kept: list[int]) -> list[str]:
    if budget.quantity is Quantity.RANK and not table.rank_rows:
        return [f"{budget}: the model has no rank gates to meet it with; expected learn_rank=True and r of at least 2"]
    if budget.quantity is not Quantity.RANK and not table.width_rows and kept:
        return [
            f"{budget}: the model has no quantizers, so no widths that could meet it: {_keeps(kept)}; expected other "
            "quantizers than that of the weight, and learn_bits=True"
        ]
    if budget.quantity is not Quantity.RANK and not table.width_rows:
        return [f"{budget}: the model has no quantizers, so no widths that could meet it; expected learn_bits=True"]
    return []


def _corners(table: GateTable) -> tuple[Amounts, Amounts, Amounts]:
    """Two bits at rank 1, two bits at full rank, and everything open."""
    none, most = torch.zeros(table.width_rows, dtype=torch.int64), torch.full((table.width_rows,), WIDTH_GATES)
    ranks = table.read().ranks.isfinite().sum(dim=1)
    return delivered(none, torch.zeros_like(ranks)), delivered(none, ranks), delivered(most, ranks)


def _out_of_reach(
    budget: Budget, cost: Cost, corners: tuple[Amounts, Amounts, Amounts], *, inputs: bool, kept: list[int]
) -> list[str]:
    # A mean over weights can rise when a layer gives up narrow ones.
    low, high = min(cost.hard(corner) for corner in corners[:2]), cost.hard(corners[2])
    if low <= budget.limit <= high:
        return []
    advice = ""
    if budget.limit < low and budget.quantity is Quantity.BOPS and not inputs:
        advice = '. No input has a quantizer, so each counts 32 bits: add "input" to quantizers'
    if kept and budget.quantity is not Quantity.RANK:
        advice += f". {_keeps(kept).capitalize()}"
    return [
        f"{budget} cannot be met: with 2 bits and rank 1 everywhere it is {low:.4g}, with all gates open {high:.4g}; "
        f"expected a limit between them{advice}"
    ]


def _keeps(kept: list[int]) -> str:
    return f"the base is quantized already, and its weights keep their {' or '.join(map(str, kept))} bits"


def _all_met(budgets: Sequence[Budget], costs: Sequence[Cost], corner: Amounts) -> bool:
    return all(cost.hard(corner) <= budget.limit for budget, cost in zip(budgets, costs, strict=True))


def _without_effect(budgets: Sequence[Budget], costs: Sequence[Cost], table: GateTable) -> Iterator[str]:
    """Budgets that nothing could use up while the others are met: whoever gave them expects something else."""
    logits = table.read()
    for index, (budget, cost) in enumerate(zip(budgets, costs, strict=True)):
        chosen = OpenGates(
            torch.full((table.width_rows,), WIDTH_GATES),
            logits.ranks.isfinite().sum(dim=1),
            PerGate(torch.zeros_like(logits.widths).double(), torch.where(logits.ranks.isfinite(), 0.0, -torch.inf)),
        )
        # What this budget counts is to stay, whatever the others can do without.
        amounts = chosen.amounts()
        chosen.wishes.widths.add_(cost.width_savings(amounts)[:, None])
        chosen.wishes.ranks.add_(cost.rank_savings(amounts)[:, None])
        others = [other for other in range(len(budgets)) if other != index]
        fit(chosen, [costs[other] for other in others], [budgets[other].limit for other in others])
        most = cost.hard(chosen.amounts())
        if budget.limit > NEARLY * most:
            rest = " and ".join(str(budgets[other]) for other in others)
            yield (
                f"{budget} contradicts {rest}, which leaves it {most:.4g} at most; expected a limit below that, or one "
                "of them"
            )
