"""Integer codes of a tensor at one bit width: the only rounding used outside sampled training.

Evaluation, the fixed-gate phase, hardened models, merging and exporters all round as `codes` does, so that what is
evaluated is bit for bit what is delivered. Training passes on a CPU run the same arithmetic fused into one pass over
memory: its divisions are true divisions there, and tests compare every width, bit for bit but for the sign of a zero.
Compilers for other devices divide approximately unless told otherwise, so there, and wherever no gradient is asked for,
the arithmetic runs as it stands here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankbits.quant.grid import UNROUNDED_WIDTH, compute_dtype, hold_step
from rankbits.quant.kernels import Fused, RangeRows

EQUAL_DEVICES = ("cpu",)
"""Where fused rounding is known to equal what it is fused from."""


def step_at(range_: Tensor, bits: Tensor | int, *, signed: bool = True) -> Tensor:
    """Step of the grid: (2 range or range) / (2^bits - 1), in the units and dtype of `range_` and of its sign.

    Args:
        range_: positive tensor; of either sign where the grid is full.
        bits: width, an int or an integer tensor that broadcasts over `range_`; meaningful for 2, 4, 8 and 16.
        signed: whether the grid covers both sides of zero.
    """
    return hold_step(range_ / steps_in_range(width_like(bits, range_), signed))


def codes(x: Tensor, step: Tensor, bits: Tensor | int, *, signed: bool = True, full: bool = False) -> Tensor:
    """Nearest integer codes, ties to even, clamped to the codes that the width has.

    Args:
        x: values, any shape.
        step: broadcasts over `x`; see `step_at`.
        bits: width, an int or an integer scalar tensor: 2, 4, 8 or 16.
        signed: codes run over [-(2^(bits-1) - 1), 2^(bits-1) - 1], else over [0, 2^bits - 1].
        full: signed codes begin at -2^(bits-1).

    Returns:
        Codes of the shape of `x`, as whole numbers in the computing dtype. Bayesian-LoRA, Eq. 3.
    """
    low, high = code_limits(width_like(bits, step), signed=signed, full=full)
    return torch.clamp(torch.round(x.to(step.dtype) / step), low, high)


def width_like(bits: Tensor | int, like: Tensor) -> Tensor:
    """The width as a tensor on the device and of the dtype of `like`; a number is not copied there, but filled in."""
    return bits.to(like) if isinstance(bits, Tensor) else torch.full((), bits, dtype=like.dtype, device=like.device)


def steps_in_range(width: Tensor, signed: bool) -> Tensor:
    """The range divided by the step, in the dtype of the width, which is a floating one."""
    levels = width.exp2() - 1.0
    return levels / 2.0 if signed else levels


def code_limits(width: Tensor, *, signed: bool, full: bool) -> tuple[Tensor, Tensor]:
    """Smallest and largest code of a width, in the dtype of the width, which is a floating one."""
    if not signed:
        return torch.zeros_like(width), width.exp2() - 1.0
    high = (width - 1.0).exp2() - 1.0
    return -high - float(full), high


def _grid(bits: Tensor | int, like: Tensor, signed: bool, full: bool) -> Tensor:
    """What `round_forward` needs to know of a width, [5], in the dtype of the range."""
    width = width_like(bits, like)
    low, high = code_limits(width, signed=signed, full=full)
    steps = steps_in_range(width, signed)
    # Half a step below the smallest signed code; nothing below zero where there is no sign.
    other_end = (low - 0.5) / steps if signed else torch.zeros_like(width)
    unrounded = (width >= UNROUNDED_WIDTH).to(width.dtype)
    return torch.stack([steps, low, high, other_end, unrounded])


def round_forward(x: Tensor, beta: Tensor, grid: Tensor) -> Tensor:
    """Values on the grid of one width.

    Args:
        x: values, any shape and floating dtype.
        beta: ranges in the computing dtype; broadcast over `x`. Of either sign where the grid is full, else positive.
        grid: [5] range / step; smallest and largest code; the other end of the range in units of `beta`, 0 or about -1;
            1 if values are clipped and not rounded, else 0. In the dtype of `beta`.

    Returns:
        Of the shape and dtype of `x`.
    """
    return _on_grid(x.to(beta.dtype), beta, grid).to(x.dtype)


def round_backward(x: Tensor, beta: Tensor, grid: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `round_forward`: those of the residual quantizer with gates that are 0 or 1.

    Args:
        x: [n, k] values, any floating dtype.
        beta: [n, 1] ranges in the computing dtype.
        grid: as in the forward.
        grad: [n, k] gradient of the loss by the output.

    Returns:
        The gradients of x [n, k] and of beta [n, 1].
    """
    values, g = x.to(beta.dtype), grad.to(beta.dtype)
    inside = _inside(values, beta, grid)
    homogeneity = _on_grid(values, beta, grid) - torch.where(inside, values, 0.0)
    grad_beta = (g * (homogeneity / hold_step(beta))).sum(dim=1, keepdim=True)
    return torch.where(inside, g, 0.0).to(x.dtype), grad_beta


def mask_backward(x: Tensor, beta: Tensor, grid: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x alone, for a range that is not trained; arguments as in `round_backward`."""
    return torch.where(_inside(x.to(beta.dtype), beta, grid), grad, 0.0)


def _ends(beta: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Between which numbers values are not clipped; a negative range lies the other way round."""
    other = beta * grid[3]
    return torch.minimum(other, beta), torch.maximum(other, beta)


def _inside(values: Tensor, beta: Tensor, grid: Tensor) -> Tensor:
    low, high = _ends(beta, grid)
    return (values >= low) & (values <= high)


def _on_grid(values: Tensor, beta: Tensor, grid: Tensor) -> Tensor:
    """Step times code, or the clipped value at 32 bits; of the shape and dtype of `values`."""
    steps_in_range, low, high, _, unrounded = grid.unbind()
    step = hold_step(beta / steps_in_range)
    rounded = step * torch.clamp(torch.round(values / step), low, high)
    return torch.where(unrounded > 0, torch.clamp(values, *_ends(beta, grid)), rounded)


_forward = Fused(round_forward)
_backward = Fused(round_backward)
_mask = Fused(mask_backward)


class _RoundToGrid(torch.autograd.Function):
    """Rounding at a fixed width in a training pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(x, beta, grid)
        rows = RangeRows(x, beta)
        # Not a view, which PyTorch would not let a following layer change in place.
        rounding = _forward if x.device.type in EQUAL_DEVICES else round_forward
        result: Tensor = rounding(rows.of(x), rows.of_range(beta), grid)
        shaped: Tensor = torch.ops.aten._unsafe_view(result, x.shape)
        return shaped

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, beta, grid = ctx.saved_tensors
        rows = RangeRows(x, beta)
        inputs = (rows.of(x), rows.of_range(beta), grid, rows.of(grads[0]))
        if not ctx.needs_input_grad[1]:
            return _mask(*inputs).reshape(x.shape), None, None
        grad_x, grad_rows = _backward(*inputs)
        return grad_x.reshape(x.shape), rows.range_gradient(grad_rows, beta), None


def round_to_grid(x: Tensor, range_: Tensor, bits: Tensor | int, *, signed: bool = True, full: bool = False) -> Tensor:
    """Values on the grid of one width: step times code; at 32 bits only clipped.

    Args:
        x: values, any shape and floating dtype; the arithmetic is float32 (float64 for float64).
        range_: a scalar tensor, or one that broadcasts over `x`; positive, or of either sign where the grid is full.
        bits: 2, 4, 8, 16 or 32, an int or an integer scalar tensor (which is never copied to the host).
        signed: whether the grid covers both sides of zero.
        full: a signed grid has one code more, below zero, or above it where the range is negative.

    Returns:
        A tensor of the shape and dtype of `x`; differentiable in `x` (identity inside the range, straight-through)
        and in `range_`.
    """
    beta = range_.to(compute_dtype(x.dtype))
    grid = _grid(bits, beta, signed, full)
    if not torch.is_grad_enabled():
        return round_forward(x, beta, grid)
    result: Tensor = _RoundToGrid.apply(x, beta, grid)  # type: ignore[no-untyped-call]
    return result
