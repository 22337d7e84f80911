"""Meeting budgets exactly: which gates to close and to reopen once learning is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankbits.gates.chain import cumulative
from rankbits.gates.hard_concrete import OPEN_LOGIT
from rankbits.training.cost_terms import Amounts, Cost, delivered
from rankbits.training.gate_table import GateLogits

MARGIN = 0.5
"""Least distance of a logit from its threshold afterwards, so that every later reading agrees."""
RANK_MARGIN = 0.1
"""Least distance of the product of straight-through gates from one half."""

LAST = 1e100
"""Added to the wish for a gate that is to close after all others."""


@dataclass
class _Chains:
    """Open gates of each chain while they are being chosen, with how much the data wants each gate."""

    widths: Tensor
    ranks: Tensor
    width_wish: Tensor
    rank_wish: Tensor

    def amounts(self) -> Amounts:
        return delivered(self.widths, self.ranks)

    def moved(self, kind: int, row: int, by: int) -> Amounts:
        """What would be delivered if one chain had one gate more or less."""
        widths, ranks = self.widths.clone(), self.ranks.clone()
        (widths, ranks)[kind][row] += by
        return delivered(widths, ranks)

    def move(self, kind: int, row: int, by: int) -> None:
        (self.widths, self.ranks)[kind][row] += by

    def wish(self, kind: int, *, last_open: bool) -> Tensor:
        """[chains] wish for the last open gate, or for the first closed one; infinite where there is none."""
        count = (self.widths, self.ranks)[kind]
        wishes = (self.width_wish, self.rank_wish)[kind]
        if not wishes.numel():
            return torch.zeros(len(count), dtype=torch.float64)
        index = count - 1 if last_open else count
        inside = (index >= 0) & (index < wishes.shape[1])
        found = wishes.gather(1, index.clamp(0, wishes.shape[1] - 1)[:, None])[:, 0]
        return torch.where(inside & found.isfinite(), found, torch.inf if last_open else -torch.inf)

    def is_open(self, like: Tensor) -> Tensor:
        """[quantizers, 4] bool: which width gates are open."""
        return torch.arange(like.shape[1]) < self.widths[:, None]


def enforce(
    logits: GateLogits, costs: Sequence[Cost], limits: Sequence[float], evidence: Tensor | None = None
) -> GateLogits:
    """Logits under which every cost is at most its limit, by little.

    While a cost is above its limit, the top open gate closes whose logit is the least above the threshold for what it
    saves (rank gates: whose probability is the least above one half). Then gates reopen that still fit, the most
    wanted first, and one gate is exchanged for a dearer one where that leaves less than the cheapest open gate.

    Args:
        logits: as learned.
        costs: what is limited.
        limits: of each cost; reachable.
        evidence: [quantizers, 4], what closing each width gate costs; it takes the place of the distance of width
            gates from their threshold, and ranks close only where widths alone cannot meet a limit.

    Returns:
        Logits of the same shapes, changed only where a gate changes sides or lies next to its threshold.
    """
    chains = _Chains(
        logits.open_widths(),
        logits.open_ranks(),
        (logits.widths - OPEN_LOGIT).double() if evidence is None else evidence.double(),
        _rank_wish(logits) + (0.0 if evidence is None else LAST),
    )
    _close(chains, costs, limits)
    _reopen(chains, costs, limits)
    _exchange(chains, costs, limits)
    return _clear(logits, chains)


def _rank_wish(logits: GateLogits) -> Tensor:
    products = cumulative(torch.sigmoid(logits.ranks.double())) - 0.5
    wish = torch.where(logits.straight[:, None], products, logits.ranks.double() - OPEN_LOGIT)
    return torch.where(logits.ranks.isfinite(), wish, -torch.inf)


def _close(chains: _Chains, costs: Sequence[Cost], limits: Sequence[float]) -> None:
    while True:
        amounts = chains.amounts()
        excess = [(cost, limit) for cost, limit in zip(costs, limits, strict=True) if cost.hard(amounts) > limit]
        if not excess:
            return
        savings = [torch.zeros(len(chains.widths)).double(), torch.zeros(len(chains.ranks)).double()]
        for cost, limit in excess:
            savings[0] += cost.width_savings(amounts).clamp(min=0.0) / limit
            savings[1] += cost.rank_savings(amounts).clamp(min=0.0) / limit
        scores = [
            torch.where((saved > 0.0) & (count > 0), chains.wish(kind, last_open=True) / saved, torch.inf)
            for kind, (saved, count) in enumerate(zip(savings, (chains.widths, chains.ranks), strict=True))
        ]
        best = [float(score.min()) if len(score) else torch.inf for score in scores]
        kind = 0 if best[0] <= best[1] else 1
        if best[kind] == torch.inf:
            return
        chains.move(kind, int(scores[kind].argmin()), -1)


def _fits(amounts: Amounts, costs: Sequence[Cost], limits: Sequence[float]) -> bool:
    return all(cost.hard(amounts) <= limit for cost, limit in zip(costs, limits, strict=True))


def _reopen(chains: _Chains, costs: Sequence[Cost], limits: Sequence[float]) -> None:
    """Open the first closed gate of chains that some budget presses, the most wanted first, while they fit."""
    refused: set[tuple[int, int]] = set()
    while True:
        pressed = _pressed(chains, costs)
        candidates = [
            (float(wish), kind, row)
            for kind in (0, 1)
            for row, wish in enumerate(chains.wish(kind, last_open=False))
            if bool(pressed[kind][row]) and float(wish) > -torch.inf and (kind, row) not in refused
        ]
        for _, kind, row in sorted(candidates, reverse=True):
            if _fits(chains.moved(kind, row, 1), costs, limits):
                chains.move(kind, row, 1)
                break
            refused.add((kind, row))
        else:
            return


def _pressed(chains: _Chains, costs: Sequence[Cost]) -> tuple[Tensor, Tensor]:
    amounts = chains.amounts()
    widths, ranks = chains.widths < 0, chains.ranks < 0
    for cost in costs:
        widths = widths | (cost.width_savings(amounts) > 0.0)
        ranks = ranks | (cost.rank_savings(amounts) > 0.0)
    return widths, ranks


def _exchange(chains: _Chains, costs: Sequence[Cost], limits: Sequence[float]) -> None:
    """Close one gate for a dearer one while more is left of a budget than its cheapest open gate costs."""
    for cost, limit in zip(costs, limits, strict=True):
        for _ in range(len(chains.widths) + len(chains.ranks)):
            amounts = chains.amounts()
            slack = limit - cost.hard(amounts)
            closing, opening = _prices(chains, cost, amounts)
            if not closing or not opening or slack < min(price for price, *_ in closing):
                break
            best = _best_exchange(closing, opening, slack)
            if best is None:
                break
            (_, _, *closed), (_, _, *opened) = best
            chains.move(closed[0], closed[1], -1)
            chains.move(opened[0], opened[1], 1)
            if not _fits(chains.amounts(), costs, limits) or cost.hard(chains.amounts()) <= limit - slack:
                chains.move(closed[0], closed[1], 1)
                chains.move(opened[0], opened[1], -1)
                break


_Price = tuple[float, float, int, int]
"""Cost, wish, kind and row of a gate."""


def _prices(chains: _Chains, cost: Cost, amounts: Amounts) -> tuple[list[_Price], list[_Price]]:
    """What closing each last open gate saves, and what opening each first closed one costs."""
    closing: list[_Price] = []
    opening: list[_Price] = []
    savings = (cost.width_savings(amounts), cost.rank_savings(amounts))
    now = cost.hard(amounts)
    for kind, count in enumerate((chains.widths, chains.ranks)):
        last, first = chains.wish(kind, last_open=True), chains.wish(kind, last_open=False)
        for row in range(len(count)):
            if float(savings[kind][row]) <= 0.0:
                continue
            if float(last[row]) < torch.inf:
                closing.append((float(savings[kind][row]), float(last[row]), kind, row))
            if float(first[row]) > -torch.inf:
                opening.append((cost.hard(chains.moved(kind, row, 1)) - now, float(first[row]), kind, row))
    return closing, opening


def _best_exchange(closing: list[_Price], opening: list[_Price], slack: float) -> tuple[_Price, _Price] | None:
    """The pair of two chains that leaves less than the cheapest gate, and among those the least unwanted.

    Where no pair leaves so little, the one that leaves least.
    """
    out, into = torch.tensor(closing, dtype=torch.float64), torch.tensor(opening, dtype=torch.float64)
    more = into[None, :, 0] - out[:, None, 0]  # [closing, opening]
    same = (into[None, :, 2:] == out[:, None, 2:]).all(dim=2)
    possible = ~same & (more > 0.0) & (more <= slack)
    if not bool(possible.any()):
        return None
    enough = possible & (slack - more < float(out[:, 0].min()))
    wish = into[None, :, 1] - out[:, None, 1]
    rank = torch.where(enough, wish, -torch.inf) if bool(enough.any()) else torch.where(possible, more, -torch.inf)
    best = int(rank.argmax())
    return closing[best // len(opening)], opening[best % len(opening)]


def _clear(logits: GateLogits, chains: _Chains) -> GateLogits:
    """Logits that stand for the chosen chains, none of them next to its threshold."""
    widths, ranks = logits.widths.clone(), logits.ranks.clone()
    is_open = chains.is_open(widths)
    widths = torch.where(is_open, widths.clamp(min=OPEN_LOGIT + MARGIN), widths.clamp(max=OPEN_LOGIT - MARGIN))
    for row, count in enumerate(chains.ranks.tolist()):
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
