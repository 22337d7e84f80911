"""Scales as they are stored: in 32 bits, or in the 16 or 8 of a float that shares a power of two with its tensor.

Fine groups make scales a good part of a weight's bytes: 4 bytes for 32 numbers are a bit of each, and the last digits
of a scale change nothing. Half precision keeps 11 significant bits of a step, E4M3 (Micikevicius et al. 2022) 4 of
them. Steps are what is rounded, not ranges, so that step times code is what runs, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankbits.quant.codes import steps_in_range, width_like
from rankbits.quant.grid import UNROUNDED_WIDTH

SCALE_BITS = (32, 16, 8)
"""Widths that scales can be stored in: float32, half precision and E4M3."""
FRACTION_BITS = {16: 10, 8: 3}
OCTAVES = {16: 30, 8: 14}
"""Octaves of normal numbers, from the highest that is complete down: 2^15 to 2^-14, and 2^7 to 2^-6."""
_FLOAT32_FRACTION, _FLOAT32_EXPONENT = 23, 0x7F80_0000


class _Stored(torch.autograd.Function):
    """Ranges whose steps are as stored, straight-through."""

    @staticmethod
    def forward(ctx: Any, ranges: Tensor, steps: Tensor, scale_bits: int) -> Tensor:
        """`ranges` of `steps` steps each."""
        return steps * stored_steps(ranges / steps, scale_bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def stored_ranges(ranges: Tensor, bits: Tensor | int, scale_bits: int, *, signed: bool = True) -> Tensor:
    """Ranges whose steps at a width of codes can be stored in so many bits.

    Args:
        ranges: all of one tensor, float32, of either sign.
        bits: width of the codes, an int or an integer scalar tensor (which is never copied to the host).
        scale_bits: one of `SCALE_BITS`.
        signed: whether the grid covers both sides of zero.

    Returns:
        The same shape and dtype; differentiable in `ranges`, straight-through. What can be stored stays as it is, and
        so do ranges of numbers that are not rounded. `codes.step_at` makes the stored steps of them, bit for bit but
        for half precision beside codes of 16 bits, which have more digits together than float32.
    """
    if scale_bits == SCALE_BITS[0]:
        return ranges
    width = width_like(bits, ranges)
    stored: Tensor = _Stored.apply(ranges, steps_in_range(width, signed), scale_bits)  # type: ignore[no-untyped-call]
    return torch.where(width < UNROUNDED_WIDTH, stored, ranges)


def headroom(scale_bits: int) -> float:
    """What a range is made larger by so that its largest value is not clipped where the step is rounded down."""
    return 1.0 if scale_bits == SCALE_BITS[0] else 1.0 + 2.0 ** -(FRACTION_BITS[scale_bits] + 1)


def stored_steps(steps: Tensor, scale_bits: int) -> Tensor:
    """The nearest steps that can be stored, ties to even; those too small for the tensor's largest are held.

    Args:
        steps: all of one tensor, float32, none of them zero.
        scale_bits: 16 or 8.
    """
    drop = _FLOAT32_FRACTION - FRACTION_BITS[scale_bits]
    words = steps.contiguous().view(torch.int32)
    # Sign and magnitude: rounding the word rounds the magnitude, into the next octave where that is nearest.
    kept = words + ((1 << (drop - 1)) - 1) + ((words >> drop) & 1)
    nearest = ((kept >> drop) << drop).view(torch.float32)
    top = (nearest.abs().amax().view(torch.int32) & _FLOAT32_EXPONENT).view(torch.float32)
    least = top * 2.0 ** (1 - OCTAVES[scale_bits])
    return torch.where(nearest.abs() < least, torch.copysign(least, steps), nearest)
