"""Which ranges round a weight best at a width that is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankbits.quant.codes import round_to_grid
from rankbits.quant.grid import RangeLayout
from rankbits.quant.scales import headroom, stored_ranges

FIT_FACTORS = tuple(1.0 - step / 31.0 for step in range(24))
"""Ranges that are tried, in units of the one whose grid just reaches the largest magnitude: down to 0.26.

In thirtieths, the best ones would leave the largest number halfway between two codes (2/3 at 2 bits, 14/15 at 4).
"""
FITTED_BITS = 4
"""The widest grid on which clipping the largest values can round the others that much better."""
RANGE_FLOOR = 1e-8
"""A tensor that never exceeded this has no range yet and stays in calibration."""


@torch.no_grad()
def best_ranges(x: Tensor, bits: int, *, layout: RangeLayout, signed: bool, full: bool) -> Tensor:
    """Ranges with which a weight is rounded with the least squared error.

    The largest value of a grid lies below its range, by a factor of 1.5 at 2 bits. From 8 bits on each range is what
    reaches the largest magnitude, however its step is rounded to be stored; at 2 and 4 bits what rounds with the least
    squared error, out of `FIT_FACTORS` times that, on either side of zero if the grid is full.

    Args:
        x: the weight.
        bits: 2, 4, 8, 16 or 32.
        layout: which elements share a range, and how its step is stored.
        signed: whether the grid covers both sides of zero.
        full: whether it has all codes of its width.

    Returns:
        Of the layout's `range_shape`; negative where the additional code of a full grid lies above zero.
    """
    values = x.detach().to(torch.float32)
    reached = layout.magnitudes(values).clamp(min=RANGE_FLOOR) / (1.0 - 1.0 / (2.0**bits - 1.0))
    widest = reached * headroom(layout.scale_bits)
    if bits > FITTED_BITS:
        return widest
    parts = layout.parts(values)
    best, least = widest, torch.full_like(widest, math.inf)
    signs = (1.0, -1.0) if full else (1.0,)
    for factor in (sign * size for size in FIT_FACTORS for sign in signs):
        candidate = stored_ranges(widest * factor, bits, layout.scale_bits, signed=signed)
        error = (round_to_grid(parts, candidate, bits, signed=signed, full=full) - parts).square()
        total = error.sum().reshape(1) if candidate.numel() == 1 else error.sum(dim=-1, keepdim=True)
        best, least = torch.where(total < least, candidate, best), torch.minimum(total, least)
    return best
