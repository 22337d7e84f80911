"""Nested gates: products, their gradients where a gate is zero, closed-form costs, straight-through rounding."""

import itertools

import pytest
import torch

from rankbits.gates import chain
from rankbits.quant.grid import bits_of_gates, expected_bits

EVERY_CHOICE = torch.tensor(list(itertools.product([False, True], repeat=4)))


def test_cumulative_products_run_along_the_last_dimension():
    gates = torch.tensor([[0.5, 0.5, 2.0], [1.0, 0.0, 3.0]])
    assert chain.cumulative(gates).tolist() == [[0.5, 0.25, 0.5], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("zeros", [(), (0,), (2,), (1, 3), (0, 1, 2, 3)])
def test_gradient_of_the_products_is_right_where_gates_are_zero(zeros):
    gates = torch.tensor([0.9, 0.4, 0.7, 0.2], dtype=torch.float64)
    gates[list(zeros)] = 0.0
    gates.requires_grad_()
    assert torch.autograd.gradcheck(chain.cumulative, gates)
    g = torch.tensor([3.0, -1.0, 2.0, 5.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad((chain.cumulative(gates) * g).sum(), gates)
    values = gates.tolist()
    for index in range(4):
        expected = 0.0
        for last in range(index, 4):
            product = g[last].item()
            for other in range(last + 1):
                product *= 1.0 if other == index else values[other]
            expected += product
        assert grad[index].item() == pytest.approx(expected, abs=1e-15)


def test_hard_gates_close_everything_behind_the_first_closed_one():
    nested = chain.hard(EVERY_CHOICE)
    assert nested.dtype == torch.bool
    for before, after in zip(EVERY_CHOICE.tolist(), nested.tolist(), strict=True):
        first = before.index(False) if False in before else 4
        assert after == [True] * first + [False] * (4 - first)


def test_long_chains_stay_open():
    """A product of counts in a narrow integer type must not wrap around."""
    assert chain.hard(torch.ones(3, 300, dtype=torch.bool)).all()


@pytest.mark.parametrize("finest", [False, True])
def test_a_closed_gate_decides_the_width_whatever_follows(finest):
    gates = chain.hard(torch.tensor([True, False, finest, True]))
    assert bits_of_gates(gates).item() == 4


def test_widths_of_all_choices():
    bits = bits_of_gates(chain.hard(EVERY_CHOICE)).tolist()
    assert sorted(set(bits)) == [2, 4, 8, 16, 32]
    z = EVERY_CHOICE.int()
    formula = 2 ** (1 + z[:, 0] + z[:, :2].prod(1) + z[:, :3].prod(1) + z.prod(1))
    assert bits == formula.tolist()


def test_expected_width_of_certain_gates_is_their_width():
    nested = chain.hard(EVERY_CHOICE)
    expected = expected_bits(chain.cumulative(EVERY_CHOICE.double()))
    assert torch.equal(expected, bits_of_gates(nested).double())


def test_expected_cost_weighs_each_link_and_broadcasts():
    probabilities = torch.tensor([[0.5, 0.5], [0.25, 1.0]], dtype=torch.float64)
    assert chain.expected_cost(probabilities, torch.tensor([8.0, 100.0])).tolist() == [29.0, 27.0]
    assert chain.expected_cost(probabilities, torch.tensor(1.0)).tolist() == [0.75, 0.5]


def test_expected_cost_and_divergence_have_right_gradients():
    probabilities = torch.tensor([[0.9, 0.35, 0.5], [0.2, 0.6, 0.1]], dtype=torch.float64, requires_grad=True)
    cost = torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(chain.expected_cost, (probabilities, cost))
    assert torch.autograd.gradcheck(lambda p: chain.kl_nats(p, 1.3), probabilities)


def test_divergence_is_zero_only_at_the_prior():
    prior = torch.full((4,), -1.0, dtype=torch.float64).exp()
    assert chain.kl_nats(prior, 1.0).abs().item() < 1e-15
    assert chain.kl_nats(prior * 0.9, 1.0).item() > 1e-4
    assert round(prior[0].item(), 3) == 0.368


def test_divergence_approaches_the_cost_for_a_strong_prior():
    probabilities = torch.tensor([0.7, 0.4, 0.9, 0.2], dtype=torch.float64)
    strength = 1e6
    cost = chain.expected_cost(probabilities, torch.tensor(strength, dtype=torch.float64))
    assert chain.kl_nats(probabilities, strength).item() == pytest.approx(cost.item(), rel=1e-5)


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan")])
def test_divergence_refuses_a_prior_without_strength(strength):
    with pytest.raises(ValueError, match=r"prior_strength must be > 0 nats per gate, got (0\.0|-1\.0|nan)"):
        chain.kl_nats(torch.tensor([0.5]), strength)


def test_rounding_closes_a_tie():
    half = torch.tensor(0.5)
    values = torch.tensor(
        [0.0, 0.4999, torch.nextafter(half, half - 1).item(), 0.5, torch.nextafter(half, half + 1).item(), 1.0]
    )
    assert chain.round_straight_through(values).tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_passes_the_gradient_through_unchanged(dtype):
    probabilities = torch.tensor([0.1, 0.5, 0.8, 1.0], dtype=dtype, requires_grad=True)
    g = torch.tensor([3.0, -2.0, 0.25, 7.0], dtype=dtype)
    gates = chain.round_straight_through(probabilities)
    (grad,) = torch.autograd.grad((gates * g).sum(), probabilities)
    assert gates.dtype == dtype
    assert torch.equal(grad, g)


@pytest.mark.parametrize(("logit", "rank"), [(0.0, 1), (1.0, 3), (2.0, 6), (3.0, 15), (4.0, 16), (6.0, 16)])
def test_rank_of_rounded_chains(logit, rank):
    """Of 16 directions one is always on; a product of exactly 1/2, as that of the first gate at logit 0, is closed."""
    probabilities = chain.cumulative(torch.sigmoid(torch.full((15,), logit, dtype=torch.float64)))
    gates = chain.round_straight_through(probabilities)
    assert (gates.diff() <= 0).all()
    assert 1 + int(gates.sum()) == rank
