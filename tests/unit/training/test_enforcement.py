"""Budgets are met exactly: never exceeded, and with less left over than the cheapest open gate costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankbits.gates.hard_concrete import OPEN_LOGIT
from rankbits.training.cost_terms import Cost, Term, Terms, delivered
from rankbits.training.enforcement import enforce
from rankbits.training.gate_table import GateLogits

NO_RANKS = torch.zeros(0, 0), torch.zeros(0, dtype=torch.bool)


def _cost(sizes: list[int], rank_sizes: list[int] | None = None) -> Cost:
    ranked = rank_sizes or []
    terms = [(size, row, None, None) for row, size in enumerate(sizes)]
    terms += [(size, None, None, row) for row, size in enumerate(ranked)]
    return Cost(Terms(terms, len(sizes), len(ranked)), float(sum(sizes)))


def _hard(cost: Cost, logits: GateLogits) -> float:
    return cost.hard(delivered(logits.open_widths(), logits.open_ranks()))


def _widths(rows: list[list[float]]) -> GateLogits:
    return GateLogits(torch.tensor(rows), *NO_RANKS)


def test_the_least_wanted_gate_for_what_it_saves_closes() -> None:
    logits = _widths([[6.0, 2.0, -4.0, -4.0], [6.0, 1.0, -4.0, -4.0], [6.0, 1.5, -4.0, -4.0]])
    found = enforce(logits, [_cost([1, 1, 1])], [20 / 3])
    assert found.open_widths().tolist() == [2, 1, 2]
    # Ten times as large, the first saves ten times as much for hardly more of a wish.
    dear = enforce(logits, [_cost([10, 1, 1])], [(40 + 8 + 8) / 12])
    assert dear.open_widths().tolist() == [1, 2, 2]


def test_what_still_fits_reopens_with_the_most_wanted_first() -> None:
    logits = _widths([[6.0, -1.0, -4.0, -4.0], [6.0, -2.0, -4.0, -4.0]])
    found = enforce(logits, [_cost([1, 1])], [6.0])
    assert found.open_widths().tolist() == [2, 1]


def test_one_gate_is_exchanged_for_a_dearer_one_where_that_leaves_less() -> None:
    logits = _widths([[6.0, -1.0, -4.0, -4.0], [6.0, -2.0, -4.0, -4.0]])
    cost = _cost([2, 3])
    # The first reopens, which makes 2 x 8 + 3 x 4 = 28 of 34 and leaves as much as the cheapest open gate, 6, costs.
    found = enforce(logits, [cost], [34 / 5])
    assert found.open_widths().tolist() == [1, 2]
    assert _hard(cost, found) == 32 / 5


def test_a_budget_that_is_met_by_a_hair_is_left_alone() -> None:
    logits = _widths([[6.0, 2.0, -4.0, -4.0], [6.0, -3.0, -4.0, -4.0]])
    found = enforce(logits, [_cost([1, 1])], [6.0])
    assert torch.equal(found.widths, logits.widths)


def test_logits_end_clear_of_their_threshold() -> None:
    logits = GateLogits(
        torch.tensor([[6.0, OPEN_LOGIT + 1e-4, OPEN_LOGIT - 1e-4, 3.0]]),
        torch.tensor([[2.0, 0.45, 1.0], [OPEN_LOGIT + 1e-4, OPEN_LOGIT - 1e-4, 3.0]]),
        torch.tensor([True, False]),
    )
    found = enforce(logits, [_cost([1], [0, 0])], [8.0])
    assert found.open_widths().tolist() == [2]
    assert found.open_ranks().tolist() == logits.open_ranks().tolist() == [2, 1]
    assert float((found.widths - OPEN_LOGIT).abs().min()) >= 0.5 - 1e-6
    products = torch.cumprod(torch.sigmoid(found.ranks[0]), dim=0)
    assert float(products[1]) >= 0.6 - 1e-6
    assert float(products[2]) <= 0.4 + 1e-6


def test_ranks_close_from_the_last_one_on() -> None:
    ranks = torch.tensor([[4.0, 4.0, 4.0], [4.0, 1.0, -torch.inf]])
    logits = GateLogits(torch.zeros(0, 4), ranks, torch.tensor([True, True]))
    cost = Cost(Terms([(1, None, None, 0), (1, None, None, 1)], 0, 2), 2.0)
    found = enforce(logits, [cost], [3.0])
    assert found.open_ranks().tolist() == [3, 1]
    assert bool(found.ranks[1, 2] == -torch.inf)


@given(
    sizes=st.lists(st.integers(1, 50), min_size=2, max_size=8),
    seed=st.integers(0, 10_000),
    share=st.floats(0.0, 1.0),
)
def test_budgets_are_never_exceeded_and_no_gate_is_left_that_fits(sizes: list[int], seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = GateLogits(
        torch.randn(len(sizes), 4, generator=generator) * 3.0 + 2.0,
        torch.randn(2, 3, generator=generator) * 2.0 + 1.0,
        torch.tensor([True, False]),
    )
    cost = _cost(sizes, [3, 40])
    low = cost.hard(delivered(torch.zeros(len(sizes), dtype=torch.int64), torch.zeros(2, dtype=torch.int64)))
    limit = low + share * (32.0 + 172 / sum(sizes) - low)
    found = enforce(logits, [cost], [limit])
    assert _hard(cost, found) <= limit
    widths, ranks = found.open_widths(), found.open_ranks()
    for chains, most in ((widths, 4), (ranks, 3)):
        for row in range(len(chains)):
            if chains[row] < most:
                chains[row] += 1
                assert cost.hard(delivered(widths, ranks)) > limit
                chains[row] -= 1
    for low_, high in ((found.widths, widths),):
        assert torch.equal((low_ > OPEN_LOGIT).to(torch.int64).cumprod(dim=1).sum(dim=1), high)


def _smallest_open(cost: Cost, found: GateLogits) -> float:
    """What closing the cheapest open gate saves; infinite where every gate is closed, or open."""
    widths, ranks = found.open_widths(), found.open_ranks()
    amounts = delivered(widths, ranks)
    savings = torch.cat([cost.width_savings(amounts), cost.rank_savings(amounts)])
    most = torch.cat([torch.full_like(widths, 4), found.ranks.isfinite().sum(dim=1)])
    counts = torch.cat([widths, ranks])
    if bool((counts == most).all()):
        return torch.inf
    return float(savings[(counts > 0) & (savings > 0.0)].min()) if bool(counts.any()) else torch.inf


def _encoder(layers: int) -> Cost:
    """Bit operations of blocks: q, k, v read one input; o, up and down one each; up and down are four times as wide."""
    terms: list[Term] = []
    for block in range(layers):
        first = 10 * block
        readers = ((0, 6, 1), (1, 6, 1), (2, 6, 1), (3, 7, 1), (4, 8, 4), (5, 9, 4))
        terms += [(size * 384**2, first + weight, first + x, None) for weight, x, size in readers]
    return Cost(Terms(terms, 10 * layers, 0), float(layers * 12 * 384**2 * 256))


def _beside(layers: int) -> Cost:
    """Bit operations of the paper's placement: W0 x, A x and B of every rank."""
    terms: list[Term] = []
    for row in range(layers):
        x, w, a, b, e = range(5 * row, 5 * row + 5)
        terms += [(384**2, w, x, None), (384, a, x, row), (384, b, e, row)]
    return Cost(Terms(terms, 5 * layers, layers), float(layers * 384**2 * 256))


@pytest.mark.parametrize(
    ("cost", "rows", "ranks"),
    [(_cost([1, 1, 1, 1, 4, 4] * 3), 18, 0), (_encoder(2), 20, 0), (_beside(4), 20, 4)],
    ids=["bits", "operations", "beside"],
)
@pytest.mark.parametrize("seed", range(20))
def test_less_is_left_than_the_cheapest_open_gate_costs(cost: Cost, rows: int, ranks: int, seed: int) -> None:
    # Given states and no drawn ones: near the upper end only dear gates are closed, and nothing may use a budget up.
    share = 0.05 + 0.9 * seed / 19
    generator = torch.Generator().manual_seed(seed)
    logits = GateLogits(
        torch.randn(rows, 4, generator=generator) * 3.0 + 2.0,
        torch.randn(ranks, 7, generator=generator) * 2.0 + 2.0,
        torch.ones(ranks, dtype=torch.bool),
    )
    none = torch.zeros(rows, dtype=torch.int64), torch.zeros(ranks, dtype=torch.int64)
    low, high = cost.hard(delivered(*none)), cost.hard(delivered(none[0] + 4, none[1] + 7))
    limit = low * (high / low) ** share
    found = enforce(logits, [cost], [limit])
    assert 0.0 <= limit - _hard(cost, found) < _smallest_open(cost, found)


def test_where_no_gates_add_up_to_the_budget_what_was_chosen_stands() -> None:
    logits = _widths([[6.0, 6.0, 6.0, 6.0]])
    # 4 bits leave 3 of 7, where the one open gate costs 2; 8 bits are too many.
    assert enforce(logits, [_cost([1])], [7.0]).open_widths().tolist() == [1]


def test_a_budget_is_left_with_more_where_another_that_is_used_up_presses_all_its_gates() -> None:
    logits = _widths([[6.0, 6.0, -4.0, -4.0], [6.0, 2.0, -4.0, -4.0]])
    tight, loose = _cost([1, 1]), _cost([2, 3])
    found = enforce(logits, [loose, tight], [7.9, 6.0])
    assert found.open_widths().tolist() == [2, 1]
    assert _hard(tight, found) == 6.0


def test_several_budgets_are_met_together() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = GateLogits(
        torch.randn(5, 4, generator=generator) + 4.0, torch.full((3, 7), 6.0), torch.ones(3, dtype=torch.bool)
    )
    widths = Cost(Terms([(row + 1, row, None, None) for row in range(5)], 5, 3), 15.0)
    ranks = Cost(Terms([(1, None, None, row) for row in range(3)], 5, 3), 3.0)
    found = enforce(logits, [widths, ranks], [5.0, 2.4])
    smallest = min((row + 1) * 2**count for row, count in enumerate(found.open_widths().tolist()) if count) / 15
    assert 5.0 - smallest < _hard(widths, found) <= 5.0
    assert _hard(ranks, found) == 7 / 3
