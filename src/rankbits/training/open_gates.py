"""Which gates of each chain are open while they are being chosen, with how much the data wants each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankbits.training.cost_terms import Amounts, Cost, delivered
from rankbits.training.gate_table import PerGate

Chain = tuple[int, int]
"""0 for a width or 1 for a rank, and the row of its chain."""


@dataclass
class OpenGates:
    """The number of open gates of each chain.

    Args:
        widths: [quantizers] int64, 0 (2 bits) to 4 (32 bits).
        ranks: [layers] int64, ranks beyond the first.
        wishes: how much the data wants each gate to be open.
    """

    widths: Tensor
    ranks: Tensor
    wishes: PerGate

    def amounts(self) -> Amounts:
        """What is delivered."""
        return delivered(self.widths, self.ranks)

    def is_open(self) -> Tensor:
        """[quantizers, 4] bool: which width gates are open."""
        return torch.arange(self.wishes.widths.shape[1]) < self.widths[:, None]

    def move(self, chain: Chain, by: int) -> None:
        """Open or close one gate."""
        kind, row = chain
        (self.widths, self.ranks)[kind][row] += by

    def moved(self, *moves: tuple[Chain, int]) -> OpenGates:
        """A copy in which gates have been opened or closed."""
        copy = OpenGates(self.widths.clone(), self.ranks.clone(), self.wishes)
        for chain, by in moves:
            copy.move(chain, by)
        return copy

    def take(self, other: OpenGates) -> None:
        """Become what another choice is."""
        self.widths, self.ranks = other.widths, other.ranks

    def wish(self, kind: int, *, last_open: bool) -> Tensor:
        """[chains] wish for the last open gate, or for the first closed one; infinite where there is none."""
        count = (self.widths, self.ranks)[kind]
        wishes = (self.wishes.widths, self.wishes.ranks)[kind]
        if not wishes.numel():
            return torch.zeros(len(count), dtype=torch.float64)
        index = count - 1 if last_open else count
        inside = (index >= 0) & (index < wishes.shape[1])
        found = wishes.gather(1, index.clamp(0, wishes.shape[1] - 1)[:, None])[:, 0]
        return torch.where(inside & found.isfinite(), found, torch.inf if last_open else -torch.inf)

    def closing(self, cost: Cost) -> dict[Chain, float]:
        """What closing the last open gate of each chain saves, where it saves anything."""
        amounts = self.amounts()
        savings = (cost.width_savings(amounts), cost.rank_savings(amounts))
        return dict(_finite(savings, [self.wish(kind, last_open=True) for kind in (0, 1)]))

    def opening(self, cost: Cost) -> dict[Chain, float]:
        """What opening the first closed gate of each chain costs, where it costs anything."""
        amounts = self.amounts()
        prices = (cost.width_prices(amounts), cost.rank_prices(amounts))
        return dict(_finite(prices, [self.wish(kind, last_open=False) for kind in (0, 1)]))

    def fits(self, costs: Sequence[Cost], limits: Sequence[float]) -> bool:
        """Whether every cost is at most its limit."""
        amounts = self.amounts()
        return all(cost.hard(amounts) <= limit for cost, limit in zip(costs, limits, strict=True))


def _finite(values: Sequence[Tensor], wishes: Sequence[Tensor]) -> Iterator[tuple[Chain, float]]:
    for kind, (value, wish) in enumerate(zip(values, wishes, strict=True)):
        for row in torch.nonzero((value > 0.0) & wish.isfinite()).flatten().tolist():
            yield (kind, row), float(value[row])
