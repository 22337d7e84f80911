"""Chains of nested gates: a gate counts only where all gates before it are open.

All functions work on the last dimension, which runs along the chain, and on any number of leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cumulative(gates: Tensor) -> Tensor:
    """Products of each gate with all gates before it.

    Args:
        gates: [..., n] gate values or probabilities of independent gates.

    Returns:
        [..., n] cumulative products; for probabilities, the marginal probability that each link of the chain holds.
        Bayesian-LoRA, Eqs. 6 and 11. The gradient is right where gates are exactly zero.
    """
    return torch.cumprod(gates, dim=-1)


def hard(open_gates: Tensor) -> Tensor:
    """Close every gate that follows a closed one.

    Args:
        open_gates: [..., n] bool.

    Returns:
        [..., n] bool: true up to the first closed gate.
    """
    return torch.cumprod(open_gates.to(torch.int8), dim=-1).to(torch.bool)


def expected_cost(probabilities: Tensor, cost: Tensor) -> Tensor:
    """Expected cost of a chain, in closed form, when each link that holds adds its own cost.

    Args:
        probabilities: [..., n] probability of each gate being open on its own.
        cost: [n], or anything that broadcasts to [..., n]: what link i adds when it and all before it are open.

    Returns:
        [...] expected cost in the units of `cost`. With a cost of one weight per link this is the penalty that
        Bayesian-LoRA's Eq. 15 puts on one chain; its derivation drops the entropy of the Bernoulli variables, which
        is accurate for a prior that is strong against the data.
    """
    return (cumulative(probabilities) * cost).sum(dim=-1)


def kl_nats(probabilities: Tensor, prior_strength: float) -> Tensor:
    """KL divergence of a chain of Bernoulli gates from a prior that opens each with probability exp(-strength).

    Args:
        probabilities: [..., n] probability of each gate being open, given that the gates before it are.
        prior_strength: > 0, in nats per open gate.

    Returns:
        [...] nats. A gate behind a closed one is closed with certainty in both distributions and adds nothing, so
        each link is weighted with the probability that the chain reaches it (van Baalen et al. 2020, Eq. 12).

    Raises:
        ValueError: `prior_strength` is not positive.
    """
    if not prior_strength > 0.0:
        raise ValueError(f"prior_strength must be > 0 nats per gate, got {prior_strength}")
    prior_closed = -torch.expm1(torch.tensor(-prior_strength, dtype=probabilities.dtype))
    entropy = torch.special.entr(probabilities) + torch.special.entr(1.0 - probabilities)
    link = probabilities * prior_strength - (1.0 - probabilities) * torch.log(prior_closed) - entropy
    reached = torch.cat([torch.ones_like(probabilities[..., :1]), cumulative(probabilities)[..., :-1]], dim=-1)
    divergence: Tensor = (reached * link).sum(dim=-1)
    return divergence


def round_straight_through(probabilities: Tensor) -> Tensor:
    """Round probabilities to gates that are exactly 0 or 1, passing the gradient through unchanged.

    Args:
        probabilities: [..., n] in [0, 1].

    Returns:
        [..., n] of the same dtype; exactly one half rounds to 0 (ties to even). Bayesian-LoRA, Alg. 1, line 2.
    """
    rounded: Tensor = _RoundStraightThrough.apply(probabilities)  # type: ignore[no-untyped-call]
    return rounded


class _RoundStraightThrough(torch.autograd.Function):
    """Round, with the identity as gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return torch.round(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
