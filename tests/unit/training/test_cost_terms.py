"""The cost of a model is what the accounting room counts, and its differences are exact."""

import pytest
import torch

from rankbits.training.cost_terms import Amounts, Cost, Terms, delivered, expected

TERMS = [(3, 0, 1, None), (5, 0, 0, 0), (7, None, 1, 1), (11, None, None, 0), (2, None, None, None)]


def _terms(**settings) -> Terms:
    return Terms(TERMS, 2, 2, **settings)


def _by_hand(first: float, second: float, one: float, other: float) -> float:
    return 3 * first * second + 5 * first * first * one + 7 * second * other + 11 * one + 2


def test_terms_are_products_of_two_widths_and_a_rank() -> None:
    amounts = delivered(torch.tensor([2, 0]), torch.tensor([3, 0]))
    assert amounts.widths.tolist() == [8.0, 2.0, 1.0]
    assert amounts.ranks.tolist() == [4.0, 1.0, 1.0]
    assert float(_terms().value(amounts)) == _by_hand(8, 2, 4, 1)


def test_expected_widths_and_ranks_are_those_of_the_chains() -> None:
    widths = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.5, 0.25, 0.0, 0.0]], dtype=torch.float64)
    amounts = expected(widths, torch.tensor([[0.5, 0.25]], dtype=torch.float64))
    assert amounts.widths.tolist() == [32.0, 2 + 2 * 0.5 + 4 * 0.25, 1.0]
    assert amounts.ranks.tolist() == [1.75, 1.0]


def test_the_expected_cost_is_differentiable() -> None:
    def cost(widths: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
        return Cost(_terms(), _terms()).soft(Amounts(widths, ranks)) + Cost(_terms(), 9.0).soft(Amounts(widths, ranks))

    widths = torch.tensor([8.0, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    ranks = torch.tensor([4.0, 1.5, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cost, (widths, ranks))


@pytest.mark.parametrize("ratio", [False, True])
def test_savings_are_differences_of_the_cost(ratio) -> None:
    reference = Terms([(1, None, None, 0), (4, None, None, 1)], 2, 2) if ratio else 10.0
    cost = Cost(_terms(), reference)
    widths, ranks = torch.tensor([2, 1]), torch.tensor([3, 2])
    now = cost.hard(delivered(widths, ranks))
    narrower = [cost.hard(delivered(torch.tensor(w), ranks)) for w in ([1, 1], [2, 0])]
    lower = [cost.hard(delivered(widths, torch.tensor(r))) for r in ([2, 2], [3, 1])]
    amounts = delivered(widths, ranks)
    assert cost.width_savings(amounts).tolist() == pytest.approx([now - less for less in narrower])
    assert cost.rank_savings(amounts).tolist() == pytest.approx([now - less for less in lower])


def test_what_is_delivered_comes_in_whole_bytes() -> None:
    amounts = delivered(torch.tensor([0, 0]), torch.tensor([0, 0]))
    terms = Terms([(3, 0, None, None), (5, None, 1, 0)], 2, 2, unit=8)
    assert terms.whole(amounts) == 8.0 + 16.0
    assert float(terms.value(amounts)) == 6.0 + 10.0
