"""Integer codes of a tensor at one bit width: the only rounding used outside sampled training.

Evaluation, the fixed-gate phase, hardened models, merging and exporters all go through `codes`, so that what is
evaluated is bit for bit what is delivered. It is never compiled: fused code may break a tie the other way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankbits.quant.grid import UNROUNDED_WIDTH, compute_dtype, hold_step


def step_at(range_: Tensor, bits: Tensor | int, *, signed: bool = True) -> Tensor:
    """Step of the grid: (2 range or range) / (2^bits - 1), in the units and dtype of `range_`.

    Args:
        range_: positive tensor.
        bits: width, an int or an integer tensor that broadcasts over `range_`; meaningful for 2, 4, 8 and 16.
        signed: whether the grid covers both sides of zero.
    """
    levels = torch.as_tensor(bits, device=range_.device).to(range_.dtype).exp2() - 1.0
    return hold_step(range_ / (levels / 2.0 if signed else levels))


def codes(x: Tensor, step: Tensor, bits: Tensor | int, *, signed: bool = True) -> Tensor:
    """Nearest integer codes, ties to even, clamped to the codes that the width has.

    Args:
        x: values, any shape.
        step: positive, broadcasts over `x`; see `step_at`.
        bits: width, an int or an integer scalar tensor: 2, 4, 8 or 16.
        signed: codes run over [-(2^(bits-1) - 1), 2^(bits-1) - 1], else over [0, 2^bits - 1].

    Returns:
        Codes of the shape of `x`, as whole numbers in the computing dtype. Bayesian-LoRA, Eq. 3.
    """
    width = torch.as_tensor(bits, device=step.device).to(step.dtype)
    high = (width - 1.0).exp2() - 1.0 if signed else width.exp2() - 1.0
    low = -high if signed else torch.zeros_like(high)
    return torch.clamp(torch.round(x.to(step.dtype) / step), low, high)


class _RoundToGrid(torch.autograd.Function):
    """Rounding at a fixed width; backward of the residual quantizer with gates that are 0 or 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor, bits: Tensor | int, signed: bool) -> Tensor:
        ctx.save_for_backward(x, beta)
        ctx.bits, ctx.signed = bits, signed
        return _on_grid(x, beta, bits, signed).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, beta = ctx.saved_tensors
        values, g = x.to(beta.dtype), grads[0].to(beta.dtype)
        inside = (values >= (-beta if ctx.signed else 0.0)) & (values <= beta)
        homogeneity = _on_grid(x, beta, ctx.bits, ctx.signed) - torch.where(inside, values, 0.0)
        grad_beta = (g * (homogeneity / hold_step(beta))).sum_to_size(beta.shape)
        return torch.where(inside, g, 0.0).to(x.dtype), grad_beta, None, None


def _on_grid(x: Tensor, beta: Tensor, bits: Tensor | int, signed: bool) -> Tensor:
    """Step times code, or the clipped value at 32 bits; of the shape of x, in the computing dtype."""
    step = step_at(beta, bits, signed=signed)
    rounded = step * codes(x, step, bits, signed=signed)
    clipped = torch.clamp(x.to(beta.dtype), -beta if signed else torch.zeros_like(beta), beta)
    return torch.where(torch.as_tensor(bits, device=x.device) >= UNROUNDED_WIDTH, clipped, rounded)


def round_to_grid(x: Tensor, range_: Tensor, bits: Tensor | int, *, signed: bool = True) -> Tensor:
    """Values on the grid of one width: step times code; at 32 bits only clipped.

    Args:
        x: values, any shape and floating dtype; the arithmetic is float32 (float64 for float64).
        range_: positive; a scalar tensor, or one that broadcasts over `x`.
        bits: 2, 4, 8, 16 or 32, an int or an integer scalar tensor (which is never copied to the host).
        signed: whether the grid covers both sides of zero.

    Returns:
        A tensor of the shape and dtype of `x`; differentiable in `x` (identity inside the range, straight-through)
        and in `range_`.
    """
    result: Tensor = _RoundToGrid.apply(  # type: ignore[no-untyped-call]
        x, range_.to(compute_dtype(x.dtype)), bits, signed
    )
    return result
