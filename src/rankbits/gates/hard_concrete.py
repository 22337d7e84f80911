"""The hard concrete gate: a switch in [0, 1] that is exactly 0 or exactly 1 with positive probability.

A gate is one real parameter, its logit. Louizos et al. 2018 ("Learning sparse neural networks through L0
regularization") stretch a concrete variable to (STRETCH_LOW, STRETCH_HIGH) and clip it to [0, 1]; van Baalen et al.
2020 ("Bayesian Bits") and Bayesian-LoRA (Alg. 2) use it with the constants below.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 2.0 / 3.0
STRETCH_HIGH = 1.1
STRETCH_LOW = -0.1
THRESHOLD = 0.34
SHIFT = TEMPERATURE * math.log(-STRETCH_HIGH / STRETCH_LOW)
"""Distance, in logits, from a gate's logit to that of its probability of being open (1.598597)."""
OPEN_LOGIT = -SHIFT - math.log(THRESHOLD / (1.0 - THRESHOLD))
"""A gate is open at inference iff its logit exceeds this value (-0.935303)."""
NOISE_MARGIN = 1e-6


def draw_noise(shape: tuple[int, ...], *, device: torch.device | None = None) -> Tensor:
    """Uniform noise for `sample`, from torch's default generator of the device.

    Args:
        shape: shape of the logits that the noise is for.
        device: where the logits live.

    Returns:
        float32 tensor of that shape with values in [1e-6, 1 - 1e-6], so that both its logarithms are finite.
    """
    return torch.rand(shape, device=device, dtype=torch.float32).clamp(NOISE_MARGIN, 1.0 - NOISE_MARGIN)


def _stretch(concrete: Tensor) -> Tensor:
    return (concrete * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0.0, 1.0)


def sample(logits: Tensor, noise: Tensor) -> Tensor:
    """Gate values of one training pass.

    Args:
        logits: gate logits, any shape.
        noise: uniform noise in (0, 1) of the same shape; the value is a pure function of both, so that a recomputed
            pass (activation checkpointing) with the same noise sees the same gates.

    Returns:
        Values in [0, 1] of the same shape, differentiable in the logits wherever they are strictly inside.
        Bayesian-LoRA, Alg. 2, lines 5-7.
    """
    return _stretch(torch.sigmoid((torch.logit(noise) + logits) / TEMPERATURE))


def mean(logits: Tensor) -> Tensor:
    """The gate value at the median of its noise, for inspection.

    It is constant for logits beyond +-`SHIFT`, with zero gradient there: never train gates with it.
    """
    return _stretch(torch.sigmoid(logits / TEMPERATURE))


def open_probability(logits: Tensor) -> Tensor:
    """P(z > 0): the probability that a sampled gate lets anything through, for any shape of logits."""
    return torch.sigmoid(logits + SHIFT)


def saturated_probability(logits: Tensor) -> Tensor:
    """P(z = 1): the probability that a sampled gate is fully open, for any shape of logits."""
    return torch.sigmoid(logits - SHIFT)


def is_open(logits: Tensor) -> Tensor:
    """The deterministic gate of inference: a bool tensor, true unless P(z = 0) >= THRESHOLD.

    Bayesian-LoRA, Alg. 2, line 9, with its misprinted range symbol read as the temperature.
    """
    return logits > OPEN_LOGIT
