"""The hard concrete gate: its noise, its two ends, its gradient and its deterministic threshold."""

import math

import pytest
import torch

from rankbits.gates import hard_concrete

DRAWS = 200_000


def _sigmas(share: float, expected: float) -> float:
    """Distance of a Monte Carlo share from its expectation, in standard errors."""
    return abs(share - expected) / math.sqrt(expected * (1.0 - expected) / DRAWS)


def test_noise_has_the_shape_type_and_margin_that_sampling_needs():
    torch.manual_seed(12)
    noise = hard_concrete.draw_noise((3, 400_000), device=torch.device("cpu"))
    assert noise.shape == (3, 400_000)
    assert noise.dtype == torch.float32
    # Unclamped draws at this seed leave the margin at both ends.
    torch.manual_seed(12)
    raw = torch.rand(3, 400_000)
    assert raw.min() < 1e-6
    assert raw.max() > 1.0 - 1e-6
    assert noise.min() == torch.tensor(1e-6)
    assert noise.max() == torch.tensor(1.0 - 1e-6)
    assert torch.logit(noise).isfinite().all()


def test_noise_comes_from_the_default_generator():
    torch.manual_seed(5)
    first = hard_concrete.draw_noise((4,))
    second = hard_concrete.draw_noise((4,))
    torch.manual_seed(5)
    assert torch.equal(hard_concrete.draw_noise((4,)), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("logit", [-4.0, -1.5, 0.0, 2.0, 6.0])
def test_monte_carlo_shares_equal_the_closed_probabilities(logit):
    torch.manual_seed(11)
    z = hard_concrete.sample(torch.full((DRAWS,), logit), hard_concrete.draw_noise((DRAWS,)))
    assert _sigmas((z > 0).float().mean().item(), 1 / (1 + math.exp(-logit - 1.59859685))) < 4.0
    assert _sigmas((z == 1).float().mean().item(), 1 / (1 + math.exp(-logit + 1.59859685))) < 4.0
    assert ((z >= 0) & (z <= 1)).all()


def test_published_table_of_probabilities():
    logits = torch.tensor([-6.0, -4.0, -2.0, hard_concrete.OPEN_LOGIT, 0.0, 2.0, 4.0, 6.0], dtype=torch.float64)
    opened, saturated = hard_concrete.open_probability(logits), hard_concrete.saturated_probability(logits)
    assert [round(p, 4) for p in (1 - opened).tolist()] == [
        0.9879,
        0.9169,
        0.5990,
        0.34,
        0.1682,
        0.0266,
        0.0037,
        0.0005,
    ]
    assert [round(p, 4) for p in saturated.tolist()] == [0.0005, 0.0037, 0.0266, 0.0735, 0.1682, 0.5990, 0.9169, 0.9879]


def test_every_view_of_a_gate_rises_with_its_logit():
    """Swapping the stretch limits raises no error but inverts the gate: this is what would notice."""
    logits = torch.linspace(-8.0, 8.0, 321, dtype=torch.float64)
    noise = torch.full_like(logits, 0.37)
    for view in (hard_concrete.open_probability, hard_concrete.saturated_probability):
        assert (view(logits).diff() > 0).all()
    for values in (hard_concrete.sample(logits, noise), hard_concrete.mean(logits)):
        assert (values.diff() >= 0).all()
        assert values[0] == 0.0
        assert values[-1] == 1.0
    assert (hard_concrete.is_open(logits).int().diff() >= 0).all()
    assert (hard_concrete.open_probability(logits) > hard_concrete.saturated_probability(logits)).all()


def test_sampled_mean_rises_with_the_logit():
    torch.manual_seed(2)
    noise = hard_concrete.draw_noise((20_000, 1))
    logits = torch.linspace(-4.0, 4.0, 17)
    assert (hard_concrete.sample(logits.expand(20_000, 17), noise.expand(20_000, 17)).mean(0).diff() > 0).all()


def test_deterministic_gate_flips_where_the_probability_of_being_closed_is_the_threshold():
    at, below, above = -0.935303, -0.93531, -0.93529
    assert hard_concrete.is_open(torch.tensor([below, above])).tolist() == [False, True]
    closed = 1.0 - hard_concrete.open_probability(torch.tensor(at, dtype=torch.float64))
    assert closed.item() == pytest.approx(0.34, abs=1e-6)
    exactly = torch.tensor(hard_concrete.OPEN_LOGIT, dtype=torch.float64)
    assert not hard_concrete.is_open(exactly)
    assert hard_concrete.is_open(exactly).dtype == torch.bool


def test_sample_is_a_pure_function_of_logit_and_noise():
    noise = torch.tensor([0.1, 0.6, 0.9])
    logits = torch.tensor([-1.0, 0.2, 1.0])
    state = torch.get_rng_state()
    assert torch.equal(hard_concrete.sample(logits, noise), hard_concrete.sample(logits, noise))
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_agree_with_finite_differences_inside():
    generator = torch.Generator().manual_seed(4)
    noise = torch.rand(200, generator=generator, dtype=torch.float64)
    logits = torch.randn(200, generator=generator, dtype=torch.float64)
    z = hard_concrete.sample(logits, noise)
    inside = (z > 0.01) & (z < 0.99)
    assert inside.sum() > 50
    logits, noise = logits[inside].requires_grad_(), noise[inside]
    assert torch.autograd.gradcheck(lambda value: hard_concrete.sample(value, noise), logits)
    assert torch.autograd.gradcheck(
        hard_concrete.mean, torch.linspace(-1.5, 1.5, 7, dtype=torch.float64, requires_grad=True)
    )
    for probability in (hard_concrete.open_probability, hard_concrete.saturated_probability):
        assert torch.autograd.gradcheck(probability, logits)


def test_a_saturated_gate_has_no_gradient():
    logits = torch.tensor([-6.0, 6.0], requires_grad=True)
    z = hard_concrete.sample(logits, torch.tensor([0.5, 0.5]))
    assert z.tolist() == [0.0, 1.0]
    (grad,) = torch.autograd.grad(z.sum(), logits)
    assert grad.tolist() == [0.0, 0.0]


def test_median_gate_is_constant_beyond_the_shift():
    shift = hard_concrete.SHIFT
    logits = torch.tensor([-shift - 1e-3, -shift + 1e-3, shift - 1e-3, shift + 1e-3], requires_grad=True)
    z = hard_concrete.mean(logits)
    (grad,) = torch.autograd.grad(z.sum(), logits)
    assert (z[0], z[3]) == (0.0, 1.0)
    assert grad[[0, 3]].tolist() == [0.0, 0.0]
    assert (grad[1:3] > 0.05).all()


def test_median_gate_is_the_sample_at_one_half():
    logits = torch.linspace(-3.0, 3.0, 25, dtype=torch.float64)
    torch.testing.assert_close(
        hard_concrete.mean(logits), hard_concrete.sample(logits, torch.full_like(logits, 0.5)), rtol=0.0, atol=1e-15
    )


@pytest.mark.parametrize("logit", [-80.0, 80.0])
def test_extreme_logits_and_noise_stay_finite(logit):
    logits = torch.full((2,), logit, requires_grad=True)
    z = hard_concrete.sample(logits, torch.tensor([1e-6, 1.0 - 1e-6]))
    (grad,) = torch.autograd.grad(z.sum(), logits)
    assert z.isfinite().all()
    assert grad.isfinite().all()
