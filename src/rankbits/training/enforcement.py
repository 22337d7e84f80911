"""Meeting budgets exactly: which gates to close and to reopen once learning is over."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rankbits.gates.chain import cumulative
from rankbits.gates.hard_concrete import OPEN_LOGIT
from rankbits.training.cost_terms import Cost
from rankbits.training.exchange import use_up
from rankbits.training.gate_table import GateLogits, PerGate
from rankbits.training.open_gates import Chain, OpenGates

MARGIN = 0.5
"""Least distance of a logit from its threshold afterwards, so that every later reading agrees."""
RANK_MARGIN = 0.1
"""Least distance of the product of straight-through gates from one half."""


def enforce(
    logits: GateLogits, costs: Sequence[Cost], limits: Sequence[float], evidence: PerGate | None = None
) -> GateLogits:
    """Logits under which every cost is at most its limit, by less than its cheapest open gate wherever that can be.

    While a cost is above its limit, the top open gate closes whose logit is the least above the threshold for what it
    saves (rank gates: whose probability is the least above one half). Then gates reopen that still fit, the most
    wanted first, and gates are exchanged for others until a budget is used up (`exchange.use_up`).

    Args:
        logits: as learned.
        costs: what is limited.
        limits: of each cost; reachable.
        evidence: what closing each gate costs; it takes the place of the distance of gates from their threshold.

    Returns:
        Logits of the same shapes, changed only where a gate changes sides or lies next to its threshold.
    """
    chosen = OpenGates(logits.open_widths(), logits.open_ranks(), _distances(logits) if evidence is None else evidence)
    fit(chosen, costs, limits)
    use_up(chosen, costs, limits)
    return clear(logits, chosen)


def fit(chosen: OpenGates, costs: Sequence[Cost], limits: Sequence[float]) -> None:
    """Close the least wanted gates for what they save until every cost is at most its limit; reopen what still fits."""
    _close(chosen, costs, limits)
    _reopen(chosen, costs, limits)


def _distances(logits: GateLogits) -> PerGate:
    products = cumulative(torch.sigmoid(logits.ranks.double())) - 0.5
    ranks = torch.where(logits.straight[:, None], products, logits.ranks.double() - OPEN_LOGIT)
    return PerGate((logits.widths - OPEN_LOGIT).double(), torch.where(logits.ranks.isfinite(), ranks, -torch.inf))


def _close(chosen: OpenGates, costs: Sequence[Cost], limits: Sequence[float]) -> None:
    while True:
        amounts = chosen.amounts()
        excess = [(cost, limit) for cost, limit in zip(costs, limits, strict=True) if cost.hard(amounts) > limit]
        if not excess:
            return
        savings = [torch.zeros(len(chosen.widths)).double(), torch.zeros(len(chosen.ranks)).double()]
        for cost, limit in excess:
            savings[0] += cost.width_savings(amounts).clamp(min=0.0) / limit
            savings[1] += cost.rank_savings(amounts).clamp(min=0.0) / limit
        scores = [
            torch.where((saved > 0.0) & (count > 0), chosen.wish(kind, last_open=True) / saved, torch.inf)
            for kind, (saved, count) in enumerate(zip(savings, (chosen.widths, chosen.ranks), strict=True))
        ]
        best = [float(score.min()) if len(score) else torch.inf for score in scores]
        kind = 0 if best[0] <= best[1] else 1
        if best[kind] == torch.inf:
            return
        chosen.move((kind, int(scores[kind].argmin())), -1)


def _reopen(chosen: OpenGates, costs: Sequence[Cost], limits: Sequence[float]) -> None:
    """Open the first closed gate of chains that some budget presses, the most wanted first, while they fit."""
    refused: set[Chain] = set()
    while True:
        wishes = [chosen.wish(kind, last_open=False).tolist() for kind in (0, 1)]
        pressed = {chain for cost in costs for chain in chosen.opening(cost)} - refused
        for chain in sorted(pressed, key=lambda chain: (wishes[chain[0]][chain[1]], chain), reverse=True):
            if chosen.moved((chain, 1)).fits(costs, limits):
                chosen.move(chain, 1)
                break
            refused.add(chain)
        else:
            return


def clear(logits: GateLogits, chosen: OpenGates) -> GateLogits:
    """Logits that stand for the chosen chains, none of them next to its threshold."""
    widths, ranks = logits.widths.clone(), logits.ranks.clone()
    is_open = chosen.is_open()
    widths = torch.where(is_open, widths.clamp(min=OPEN_LOGIT + MARGIN), widths.clamp(max=OPEN_LOGIT - MARGIN))
    for row, count in enumerate(chosen.ranks.tolist()):
        high, low = OPEN_LOGIT + MARGIN, OPEN_LOGIT - MARGIN
        if bool(logits.straight[row]):
            # Equal gates whose product is clear of one half; one gate below suffices to close.
            share = (0.5 + RANK_MARGIN) ** (1.0 / max(count, 1))
            high, low = _logit(share), _logit(0.5 - RANK_MARGIN)
        ranks[row, :count] = ranks[row, :count].clamp(min=high)
        ranks[row, count : count + 1] = ranks[row, count : count + 1].clamp(max=low)
        if not bool(logits.straight[row]):
            ranks[row, count:] = ranks[row, count:].clamp(max=low)
    return GateLogits(widths, ranks, logits.straight)


def _logit(probability: float) -> float:
    return float(torch.logit(torch.tensor(probability, dtype=torch.float64)))
