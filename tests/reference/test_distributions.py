"""The gates agree with torch.distributions: relaxed Bernoulli samples, Bernoulli divergences, enumerated chains."""

import itertools

import pytest
import torch
from torch.distributions import Bernoulli, Uniform, kl_divergence
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli, RelaxedBernoulli
from torch.distributions.transforms import SigmoidTransform

from rankbits.gates import chain, hard_concrete

LOGITS = torch.tensor([-5.0, -2.0, -0.9, 0.0, 0.4, 1.7, 6.0], dtype=torch.float64)
CHAINS = torch.tensor([[0.9, 0.35, 0.5, 0.08], [0.01, 0.99, 0.6, 0.2], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)


def _configurations(links: int) -> list[torch.Tensor]:
    """All values of a nested chain: ones, then zeros."""
    every = itertools.product((0.0, 1.0), repeat=links)
    return [torch.tensor(c, dtype=torch.float64) for c in every if list(c) == sorted(c, reverse=True)]


def _log_probability(configuration: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Of a chain whose link i is Bernoulli(p_i) behind an open gate and closed behind a closed one."""
    reached = torch.cat([torch.ones(1, dtype=torch.float64), configuration[:-1]])
    return (Bernoulli(probabilities).log_prob(configuration) * reached).sum(-1)


def test_samples_are_stretched_relaxed_bernoulli_samples():
    distribution = RelaxedBernoulli(torch.tensor(2.0 / 3.0, dtype=torch.float64), logits=LOGITS)
    torch.manual_seed(0)
    concrete = distribution.rsample((500,))
    torch.manual_seed(0)
    noise = torch.rand((500, 7), dtype=torch.float64)
    expected = (concrete * 1.2 - 0.1).clamp(0.0, 1.0)
    torch.testing.assert_close(hard_concrete.sample(LOGITS.expand(500, 7), noise), expected, rtol=1e-9, atol=1e-9)


def test_probabilities_are_those_of_the_relaxed_bernoulli_beyond_the_stretch():
    """P(z > 0) = P(concrete > 0.1 / 1.2), from the logistic law of the relaxed Bernoulli's logit."""
    temperature = torch.tensor(2.0 / 3.0, dtype=torch.float64)
    base = torch.distributions.TransformedDistribution(
        Uniform(torch.tensor(0.0, dtype=torch.float64), 1.0),
        [
            SigmoidTransform().inv,
            torch.distributions.AffineTransform(LOGITS / temperature, 1.0 / temperature),
            SigmoidTransform(),
        ],
    )
    low = torch.tensor(0.1 / 1.2, dtype=torch.float64)
    high = torch.tensor(1.1 / 1.2, dtype=torch.float64)
    torch.testing.assert_close(hard_concrete.open_probability(LOGITS), 1.0 - base.cdf(low), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(hard_concrete.saturated_probability(LOGITS), 1.0 - base.cdf(high), rtol=1e-9, atol=1e-12)


def test_density_between_the_saturated_ends_is_the_relaxed_bernoulli_s():
    """P(a < z < b) by counting equals the integral of the foreign density."""
    logit = torch.tensor(0.4)
    torch.manual_seed(1)
    z = hard_concrete.sample(logit.expand(200_000), hard_concrete.draw_noise((200_000,)))
    grid = torch.linspace(0.25, 0.65, 4001, dtype=torch.float64)
    concrete = (grid + 0.1) / 1.2
    density = LogitRelaxedBernoulli(torch.tensor(2.0 / 3.0, dtype=torch.float64), logits=logit.double())
    values = density.log_prob(torch.logit(concrete)).exp() / (concrete * (1 - concrete)) / 1.2
    share = ((z > 0.25) & (z < 0.65)).double().mean()
    expected = torch.trapezoid(values, grid)
    assert abs(share - expected) <= 5.0 * (expected * (1 - expected) / 200_000).sqrt()


@pytest.mark.parametrize("strength", [0.05, 1.0, 12.0])
def test_divergence_of_one_gate_is_bernoulli_s(strength):
    probabilities = torch.tensor([[0.0], [0.2], [0.7], [1.0]], dtype=torch.float64)
    prior = Bernoulli(torch.tensor(-strength, dtype=torch.float64).exp())
    torch.testing.assert_close(
        chain.kl_nats(probabilities, strength),
        kl_divergence(Bernoulli(probabilities), prior).squeeze(-1),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("strength", [0.05, 1.0, 12.0])
def test_divergence_of_a_chain_is_the_sum_over_all_its_values(strength):
    prior = torch.full((4,), -strength, dtype=torch.float64).exp()
    for probabilities in CHAINS:
        logs = [(_log_probability(c, probabilities), _log_probability(c, prior)) for c in _configurations(4)]
        assert sum(q.exp() for q, _ in logs).item() == pytest.approx(1.0, rel=1e-12)
        expected = sum(q.exp() * (q - p) for q, p in logs)
        torch.testing.assert_close(chain.kl_nats(probabilities, strength), expected, rtol=1e-10, atol=1e-12)


def test_expected_cost_is_the_sum_over_all_values_of_a_chain():
    cost = torch.tensor([2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    expected = torch.stack(
        [sum(_log_probability(c, p).exp() * (c * cost).sum() for c in _configurations(4)) for p in CHAINS]
    )
    torch.testing.assert_close(chain.expected_cost(CHAINS, cost), expected, rtol=1e-12, atol=0.0)
