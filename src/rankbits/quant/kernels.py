"""The residual quantizer with its closed-form backward, fused by torch.compile.

Same signature and values as `reference.quantize`, except that levels are worked out in units of the coarsest step, and
fused, which may change the last bits of a value and break a tie of rounding the other way.

The backward needs only the input, the range, the gates and the incoming gradient; residuals are recomputed, so nothing
else is saved. Inside the range the gradient of the input is the identity whatever the gates, because the
straight-through terms of the residuals cancel; and because the quantizer is homogeneous of degree one in (x, range),
the gradient of the range follows from Euler's relation.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rankbits.errors import RankbitsWarning
from rankbits.quant.grid import (
    COARSEST_CODES,
    GATED_WIDTHS,
    STEP_DIVISORS,
    UNROUNDED_WIDTH,
    coarsest_step,
    compute_dtype,
    hold_step,
)

COMPILE_SWITCH = "RANKBITS_COMPILE"
"""Environment variable; 0 keeps the kernels eager."""


def _in_steps(x: Tensor, step: Tensor, signed: bool) -> Tensor:
    """Clipped values in units of the coarsest step: at most 1.5 of them on each side of zero, or 3 on the one."""
    return torch.clamp(x.to(step.dtype) / step, -1.5 if signed else 0.0, 1.5 if signed else 3.0)


def _parts(rest: Tensor, signed: bool) -> list[Tensor]:
    """The 2-bit part and the four residuals of clipped values, all in units of the coarsest step; each [n, k].

    A level costs one product with a constant where the reference divides by its step, and no clamp: what rounding
    leaves over is at most 1/2, so that the next quotient is at most half an odd divisor, a tie which goes to the even
    number below it, and that is the bound (2, 8, 128, 32768). Only the tie at 1.5 has its even number outside.
    """
    code = torch.round(rest)
    if signed:
        code = code.clamp(*COARSEST_CODES[signed])
    parts, unit = [code], 1.0
    for bits, divisor in zip(GATED_WIDTHS, STEP_DIVISORS, strict=True):
        rest, unit = (rest - code) * divisor, unit / divisor
        resolved = bits < UNROUNDED_WIDTH or rest.dtype == torch.float64
        code = torch.round(rest) if resolved else rest
        parts.append(code * unit)
    return parts


def _gated_sum(parts: list[Tensor], links: Tensor) -> Tensor:
    total = parts[0]
    for index, part in enumerate(parts[1:]):
        total = total + links[index] * part
    return total


def quantize_forward(x: Tensor, step: Tensor, links: Tensor, signed: bool) -> Tensor:
    """Values on the gated grid.

    Args:
        x: [n, k] values, any floating dtype.
        step: [n, 1] `coarsest_step` of the ranges, in the computing dtype.
        links: [4] cumulative gate products in the computing dtype.
        signed: whether the grid covers both sides of zero.

    Returns:
        [n, k] of the dtype of `x`.
    """
    return (step * _gated_sum(_parts(_in_steps(x, step, signed), signed), links)).to(x.dtype)


def quantize_backward(
    x: Tensor, beta: Tensor, step: Tensor, links: Tensor, grad: Tensor, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `quantize_forward`, in closed form.

    Args:
        x, step, links, signed: as in the forward.
        beta: [n, 1] positive ranges in the computing dtype.
        grad: [n, k] gradient of the loss by the output.

    Returns:
        The gradients of x [n, k], of beta [n, 1] and of the links, from each row [n, 4]:
        g m, sum of g (x_q - x m) / beta, and sums of g e_b, with m = 1 inside the closed range and 0 outside.
    """
    values, g = x.to(beta.dtype), grad.to(beta.dtype)
    inside = (values >= (-beta if signed else 0.0)) & (values <= beta)
    clipped = _in_steps(x, step, signed)
    parts = _parts(clipped, signed)
    homogeneity = _gated_sum(parts, links) - torch.where(inside, clipped, 0.0)
    grad_beta = (g * homogeneity).sum(dim=1, keepdim=True) * (step / hold_step(beta))
    grad_links = [(g * part).sum(dim=1, keepdim=True) * step for part in parts[1:]]
    return torch.where(inside, g, 0.0).to(x.dtype), grad_beta, torch.cat(grad_links, dim=1)


class Fused:
    """A function fused by torch.compile at its first call, or the function itself where that is impossible."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.eager = function
        self.compiled: Callable[..., Any] | None = torch.compile(function, dynamic=True, fullgraph=True)

    def __call__(self, *args: Any) -> Any:
        """Run the function on these arguments."""
        if self.compiled is None or os.environ.get(COMPILE_SWITCH) == "0" or torch.compiler.is_compiling():
            return self.eager(*args)
        try:
            return self.compiled(*args)
        # Whatever stops the compiler (no C++ compiler, an unsupported platform, a full disk), eager code still works.
        except Exception as reason:  # noqa: BLE001
            result = self.eager(*args)
            self.compiled = None
            warnings.warn(
                f"rankbits: {self.eager.__name__} runs without fusion, about ten times slower, because torch.compile "
                f"failed: {type(reason).__name__}: {' '.join(str(reason).split(chr(10) * 2)[0].split())}. "
                f"A C++ compiler on the path mends most cases; {COMPILE_SWITCH}=0 chooses eager code silently.",
                RankbitsWarning,
                stacklevel=2,
            )
            return result


_forward = Fused(quantize_forward)
_backward = Fused(quantize_backward)


class RangeRows:
    """How a tensor falls into rows of elements that share one range.

    Compiled code sees two-dimensional tensors without history, whatever the caller's shapes, and so needs few graphs.
    """

    def __init__(self, x: Tensor, beta: Tensor) -> None:
        self.aligned = (1,) * (x.dim() - beta.dim()) + tuple(beta.shape)
        split = len(self.aligned)
        # A loop, because torch.compile, where a whole model is compiled, does not follow max() with a default.
        while split and self.aligned[split - 1] == 1:
            split -= 1
        self.leading, self.trailing = tuple(x.shape[:split]), tuple(x.shape[split:])

    def of(self, values: Tensor) -> Tensor:
        """Values of the shape of x as [n, k]."""
        return values.reshape(math.prod(self.leading), math.prod(self.trailing)).contiguous().detach()

    def of_range(self, beta: Tensor) -> Tensor:
        """The ranges as [n, 1]."""
        ranges = beta.detach().reshape(self.aligned[: len(self.leading)])
        return ranges.expand(self.leading).reshape(-1, 1).detach()

    def range_gradient(self, grad: Tensor, beta: Tensor) -> Tensor:
        """[n, 1] gradients summed to the shape of the range."""
        grad = grad.reshape(self.leading + (1,) * len(self.trailing))
        return grad.sum_to_size(self.aligned).reshape(beta.shape)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor, links: Tensor, signed: bool) -> Tensor:
        ctx.save_for_backward(x, beta, links)
        ctx.signed = signed
        rows = RangeRows(x, beta)
        # Not a view, which PyTorch would not let a following layer change in place.
        step = coarsest_step(rows.of_range(beta), signed=signed)
        result: Tensor = _forward(rows.of(x), step, links.detach(), signed)
        shaped: Tensor = torch.ops.aten._unsafe_view(result, x.shape)
        return shaped

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, beta, links = ctx.saved_tensors
        rows = RangeRows(x, beta)
        ranges = rows.of_range(beta)
        step = coarsest_step(ranges, signed=ctx.signed)
        grad_x, grad_rows, grad_links = _backward(
            rows.of(x), ranges, step, links.detach(), rows.of(grads[0]), ctx.signed
        )
        return grad_x.reshape(x.shape), rows.range_gradient(grad_rows, beta), grad_links.sum(dim=0), None


def quantize(x: Tensor, range_: Tensor, gates: Tensor, *, signed: bool = True) -> Tensor:
    """`reference.quantize`, fused: same arguments, values and gradients, a fraction of the time and memory.

    Args:
        x: values, any shape and floating dtype; the arithmetic is float32 (float64 for float64).
        range_: positive; a scalar tensor, or one that broadcasts over `x`.
        gates: [4] gate values in [0, 1] for 4, 8, 16 and 32 bits.
        signed: whether the grid covers both sides of zero.

    Returns:
        A tensor of the shape and dtype of `x`, differentiable in all three tensors.
    """
    dtype = compute_dtype(x.dtype)
    result: Tensor = _Quantize.apply(  # type: ignore[no-untyped-call]
        x, range_.to(dtype), torch.cumprod(gates.to(dtype), dim=-1), signed
    )
    return result
