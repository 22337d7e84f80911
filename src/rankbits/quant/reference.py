"""The residual quantizer written the obvious way; the tests believe this file."""

from __future__ import annotations

import torch
from torch import Tensor

from rankbits.quant.grid import (
    COARSEST_CODES,
    RESIDUAL_BOUNDS,
    STEP_DIVISORS,
    coarsest_step,
    compute_dtype,
    hold_step,
)


def _round_and_clamp(value: Tensor, low: int, high: int) -> Tensor:
    """Integer code of a quotient; the gradient of rounding together with the clamp is the identity.

    The clamp is needed at every level: at the edge of the range the quotient is a tie, and floating-point division
    can break it outwards.
    """
    code = torch.round(value).clamp(low, high)
    return value + (code - value).detach()


def quantize(x: Tensor, range_: Tensor, gates: Tensor, *, signed: bool = True) -> Tensor:
    """Round a tensor to 2 bits and add the gated residuals of 4, 8, 16 and 32 bits.

    Args:
        x: values, any shape and floating dtype; the arithmetic is float32 (float64 for float64).
        range_: positive; a scalar tensor, or one that broadcasts over `x`. Values outside [-range_, range_]
            (unsigned: [0, range_]) are clipped.
        gates: [4] gate values in [0, 1] for 4, 8, 16 and 32 bits; each acts only through those before it.
        signed: whether the grid covers both sides of zero.

    Returns:
        A tensor of the shape and dtype of `x`: x_2 + z_4 (e_4 + z_8 (e_8 + z_16 (e_16 + z_32 e_32))), Bayesian-LoRA
        Alg. 2. Differentiable in all three tensors, straight-through over rounding.
    """
    dtype = compute_dtype(x.dtype)
    beta, z = range_.to(dtype), gates.to(dtype)
    clipped = torch.clamp(x.to(dtype), -beta if signed else torch.zeros_like(beta), beta)

    step = coarsest_step(beta, signed=signed)
    coarse = step * _round_and_clamp(clipped / step, *COARSEST_CODES[signed])
    total, residuals = coarse, []
    for divisor, bound in zip(STEP_DIVISORS, RESIDUAL_BOUNDS, strict=True):
        step = hold_step(step / divisor)
        residual = step * _round_and_clamp((clipped - total) / step, -bound, bound)
        residuals.append(residual)
        total = total + residual

    gated = torch.zeros_like(clipped)
    for gate, residual in zip(reversed(z.unbind()), reversed(residuals), strict=True):
        gated = gate * (residual + gated)
    return (coarse + gated).to(x.dtype)
