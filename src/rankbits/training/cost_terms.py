"""The cost of a model as a sum of products of widths and ranks, expected or delivered.

cost = sum_t c_t F[left_t] F[right_t] R[rank_t] / reference, where F holds the width of every gated quantizer and a one,
R the rank of every gated layer and a one. Gates are independent, so expectations multiply (method of Bayesian-LoRA,
Eq. 15, with the costs of van Baalen et al. 2020).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rankbits.quant.grid import expected_bits

Term = tuple[int, int | None, int | None, int | None]
"""A coefficient and the slots of two widths and of a rank; None for a factor of one."""


@dataclass(frozen=True)
class Amounts:
    """Widths and ranks of all slots, float64.

    Args:
        widths: [quantizers + 1], the last is one.
        ranks: [layers + 1], the last is one.
    """

    widths: Tensor
    ranks: Tensor


def delivered(open_widths: Tensor, open_ranks: Tensor) -> Amounts:
    """Widths 2^(1 + n) and ranks 1 + n of chains with n open gates, from [quantizers] and [layers] int64."""
    return Amounts(_with_one(torch.pow(2.0, 1.0 + open_widths.double())), _with_one(1.0 + open_ranks.double()))


def expected(width_probabilities: Tensor, rank_probabilities: Tensor) -> Amounts:
    """Mean widths 2 + 2 p_4 + 4 p_8 + 8 p_16 + 16 p_32 and mean ranks 1 + sum p.

    Args:
        width_probabilities: [quantizers, 4].
        rank_probabilities: [layers, r - 1].
    """
    return Amounts(_with_one(expected_bits(width_probabilities)), _with_one(1.0 + rank_probabilities.sum(dim=1)))


def _with_one(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_ones(1)])


class Terms:
    """A sum of products.

    Args:
        terms: what is added.
        quantizers: number of gated widths.
        layers: number of gated ranks.
        unit: what is delivered comes in whole multiples of this, term by term: 8 bits to a byte.
    """

    def __init__(self, terms: Iterable[Term], quantizers: int, layers: int, *, unit: int = 1) -> None:
        listed = list(terms)
        self.coefficient = torch.tensor([float(term[0]) for term in listed], dtype=torch.float64)
        self.left = _slots((term[1] for term in listed), quantizers)
        self.right = _slots((term[2] for term in listed), quantizers)
        self.rank = _slots((term[3] for term in listed), layers)
        self.unit = unit

    def value(self, amounts: Amounts) -> Tensor:
        """Scalar, differentiable in the amounts."""
        return self._products(amounts).sum()

    def whole(self, amounts: Amounts) -> float:
        """The sum with each product rounded up to whole units."""
        products = self._products(amounts)
        return float((torch.ceil(products / self.unit) * self.unit).sum()) if self.unit > 1 else float(products.sum())

    def change_of_widths(self, amounts: Amounts, new: Tensor) -> Tensor:
        """[quantizers] change of the sum if one width alone becomes `new`, exact where both factors share a gate."""
        widths, ranks = amounts.widths, amounts.ranks
        by_left = self.coefficient * widths[self.right] * ranks[self.rank]
        by_right = self.coefficient * widths[self.left] * ranks[self.rank]
        slope = torch.zeros_like(widths).index_add(0, self.left, by_left).index_add(0, self.right, by_right)
        both = torch.where(self.left == self.right, self.coefficient * ranks[self.rank], 0.0)
        square = torch.zeros_like(widths).index_add(0, self.left, both)
        step = new - widths[:-1]
        return slope[:-1] * step + square[:-1] * step.square()

    def change_of_ranks(self, amounts: Amounts) -> Tensor:
        """[layers] change of the sum if the rank of one layer falls by one."""
        per_rank = self.coefficient * amounts.widths[self.left] * amounts.widths[self.right]
        return -torch.zeros_like(amounts.ranks).index_add(0, self.rank, per_rank)[:-1]

    def _products(self, amounts: Amounts) -> Tensor:
        widths, ranks = amounts.widths, amounts.ranks
        return self.coefficient * widths[self.left] * widths[self.right] * ranks[self.rank]


def _slots(slots: Iterable[int | None], one: int) -> Tensor:
    return torch.tensor([one if slot is None else slot for slot in slots], dtype=torch.int64)


@dataclass(frozen=True)
class Cost:
    """A cost relative to a reference.

    Args:
        terms: what is paid.
        reference: what it is compared with; terms, where that depends on ranks (the number of weights).
        presses_ranks: whether giving up ranks is a way to pay less; a mean over weights is none.
    """

    terms: Terms
    reference: float | Terms
    presses_ranks: bool = True

    def soft(self, amounts: Amounts) -> Tensor:
        """Expected cost, a scalar that is differentiable in the amounts."""
        whole = self.reference if isinstance(self.reference, float) else self.reference.value(amounts)
        return self.terms.value(amounts) / whole

    def hard(self, amounts: Amounts) -> float:
        """Cost of what is delivered."""
        return self.terms.whole(amounts) / self._reference(amounts)

    def width_savings(self, amounts: Amounts) -> Tensor:
        """[quantizers] what halving each width would save."""
        return -self.terms.change_of_widths(amounts, amounts.widths[:-1] / 2.0) / self._reference(amounts)

    def rank_savings(self, amounts: Amounts) -> Tensor:
        """[layers] what one rank less in each layer would save."""
        return self._less_rank(amounts, 1.0)

    def width_prices(self, amounts: Amounts) -> Tensor:
        """[quantizers] what doubling each width would cost."""
        return self.terms.change_of_widths(amounts, amounts.widths[:-1] * 2.0) / self._reference(amounts)

    def rank_prices(self, amounts: Amounts) -> Tensor:
        """[layers] what one rank more in each layer would cost."""
        return -self._less_rank(amounts, -1.0)

    def _less_rank(self, amounts: Amounts, ranks: float) -> Tensor:
        """[layers] what so many ranks less in each layer would save."""
        if not self.presses_ranks:
            return torch.zeros_like(amounts.ranks[:-1])
        paid, whole = float(self.terms.value(amounts)), self._reference(amounts)
        less = ranks * self.terms.change_of_ranks(amounts)
        smaller = 0.0 if isinstance(self.reference, float) else ranks * self.reference.change_of_ranks(amounts)
        return paid / whole - (paid + less) / (whole + smaller)

    def _reference(self, amounts: Amounts) -> float:
        return self.reference if isinstance(self.reference, float) else float(self.reference.value(amounts))
