"""Exchanging gates for one another until a budget is used up but for less than its cheapest open gate.

Closing and reopening one gate at a time leaves up to twice as much, because the next gate of a chain costs twice what
its last one does. Which gates fill a budget best is a knapsack problem; a short search over exchanges, those of one
gate for another first, solves it in practice. Where it finds nothing (few tensors, whose gates add up to nothing near
the budget), what was chosen stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

import torch

from rankbits.training.cost_terms import Cost
from rankbits.training.open_gates import Chain, OpenGates

EXPANSIONS = 6
"""Choices from which the search goes on before it gives up."""


def use_up(chosen: OpenGates, costs: Sequence[Cost], limits: Sequence[float]) -> None:
    """Exchange gates until what is left of each budget is less than its cheapest open gate, and no gate fits.

    Budgets come in the order in which they are nearly used up. One whose gates are all pressed by another that is used
    up is left as it is: what it has to spare, the other forbids.

    Args:
        chosen: gates under which every cost is at most its limit and none that is pressed could reopen; changed.
        costs: what is limited.
        limits: of each cost.
    """
    shares = [cost.hard(chosen.amounts()) / limit for cost, limit in zip(costs, limits, strict=True)]
    used_up: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: -shares[index]):
        if any(_pressed(chosen, costs[index]) <= _pressed(chosen, costs[other]) for other in used_up):
            continue
        goal = _Goal(tuple(costs), tuple(limits), index, tuple(used_up))
        found = chosen if goal.is_met(chosen) else _search(chosen, goal)
        if found is not None:
            chosen.take(found)
            used_up.append(index)


def _pressed(chosen: OpenGates, cost: Cost) -> set[Chain]:
    return chosen.closing(cost).keys() | chosen.opening(cost).keys()


@dataclass(frozen=True)
class _Goal:
    """One budget used up while all are kept and others stay used up.

    Args:
        costs: what is limited.
        limits: of each cost.
        index: the budget to use up.
        others: those that already are.
    """

    costs: tuple[Cost, ...]
    limits: tuple[float, ...]
    index: int
    others: tuple[int, ...]

    def slack(self, chosen: OpenGates) -> float:
        return self.limits[self.index] - self.costs[self.index].hard(chosen.amounts())

    def closing(self, chosen: OpenGates) -> dict[Chain, float]:
        return chosen.closing(self.costs[self.index])

    def shortfall(self, chosen: OpenGates) -> float:
        """What is left of the budget over its cheapest open gate; below 1 once it is used up."""
        return self.slack(chosen) / min(self.closing(chosen).values(), default=torch.inf)

    def is_met(self, chosen: OpenGates) -> bool:
        for index in (self.index, *self.others):
            goal = _Goal(self.costs, self.limits, index, ())
            if chosen.opening(self.costs[index]) and goal.shortfall(chosen) >= 1.0:
                return False
        return chosen.fits(self.costs, self.limits) and not self.fitting(chosen)

    def fitting(self, chosen: OpenGates) -> dict[Chain, float]:
        """Gates that can open within all limits, with what the budget pays for each."""
        amounts = chosen.amounts()
        left = [limit - cost.hard(amounts) for cost, limit in zip(self.costs, self.limits, strict=True)]
        prices = [chosen.opening(cost) for cost in self.costs]
        return {
            chain: prices[self.index].get(chain, 0.0)
            for chain in dict.fromkeys(chain for listed in prices for chain in listed)
            if all(other.get(chain, 0.0) <= rest for other, rest in zip(prices, left, strict=True))
        }


def _search(start: OpenGates, goal: _Goal) -> OpenGates | None:
    """The first choice that meets the goal, nearest first, and of each step's the least unwanted; None without any."""
    order = count()
    waiting = [(goal.shortfall(start), next(order), start)]
    seen = {_key(start)}
    for _ in range(EXPANSIONS):
        if not waiting:
            break
        _, _, chosen = heappop(waiting)
        found = _exchanged(chosen, goal)
        if found is not None:
            return found
        reached = [*_filled(chosen, goal), *_covered(chosen, goal)]
        met = [after for after in reached if goal.is_met(after)]
        if met:
            return max(met, key=lambda after: _gain(chosen, after))
        for after in reached:
            if _key(after) not in seen and after.fits(goal.costs, goal.limits):
                seen.add(_key(after))
                heappush(waiting, (goal.shortfall(after), next(order), after))
    return None


def _exchanged(chosen: OpenGates, goal: _Goal) -> OpenGates | None:
    """One gate for another, the most wanted for the least wanted, where that meets the goal."""
    cheapest = min(goal.closing(chosen).values(), default=torch.inf)
    lost = [chosen.wish(kind, last_open=True).tolist() for kind in (0, 1)]
    found: list[tuple[float, Chain, Chain]] = []
    for closed in goal.closing(chosen):
        rest = chosen.moved((closed, -1))
        slack, wished = goal.slack(rest), [rest.wish(kind, last_open=False).tolist() for kind in (0, 1)]
        found += [
            (wished[opened[0]][opened[1]] - lost[closed[0]][closed[1]], closed, opened)
            for opened, price in goal.fitting(rest).items()
            if opened != closed and slack - price < cheapest
        ]
    reached = (chosen.moved((closed, -1), (opened, 1)) for _, closed, opened in sorted(found, reverse=True))
    return next((after for after in reached if goal.is_met(after)), None)


def _filled(chosen: OpenGates, goal: _Goal) -> Iterator[OpenGates]:
    """Close one gate, and open what fits, the dearest first."""
    for closed in goal.closing(chosen):
        after = chosen.moved((closed, -1))
        fitting = goal.fitting(after)
        fitting.pop(closed, None)
        while fitting:
            after.move(max(fitting, key=fitting.__getitem__), 1)
            fitting = goal.fitting(after)
        yield after


def _covered(chosen: OpenGates, goal: _Goal) -> Iterator[OpenGates]:
    """Open one gate, and close what pays for it: the dearest that are not too dear, and the cheapest last."""
    for opened in chosen.opening(goal.costs[goal.index]):
        after = chosen.moved((opened, 1))
        while goal.slack(after) < 0.0:
            closing = goal.closing(after)
            closing.pop(opened, None)
            if not closing:
                break
            below = {chain: saved for chain, saved in closing.items() if saved <= -goal.slack(after)}
            best = max(below, key=below.__getitem__) if below else min(closing, key=closing.__getitem__)
            after.move(best, -1)
        yield after


def _gain(before: OpenGates, after: OpenGates) -> float:
    """How much more wanted the gates are that opened than those that closed."""
    gain = 0.0
    for kind, counts in enumerate(((before.widths, after.widths), (before.ranks, after.ranks))):
        wishes = (before.wishes.widths, before.wishes.ranks)[kind]
        for row, (old, new) in enumerate(zip(counts[0].tolist(), counts[1].tolist(), strict=True)):
            gain += float(wishes[row, old:new].sum()) - float(wishes[row, new:old].sum())
    return gain


def _key(chosen: OpenGates) -> tuple[int, ...]:
    return (*chosen.widths.tolist(), *chosen.ranks.tolist())
