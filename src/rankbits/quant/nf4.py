"""4-bit NormalFloat with double quantization (Dettmers et al. 2023, QLoRA) from first principles; tests believe this.

Its sixteen values are quantiles of the standard normal distribution, so that weights drawn from one use every code
about equally often. Each block of weights is divided by its largest magnitude; double quantization stores these
magnitudes themselves in 8 bits, on a grid whose steps grow with the value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK, OUTER_BLOCK = 64, 256
"""Weights with one scale, and scales with one scale."""
LARGEST_QUANTILE = 0.9677083
"""Probability of the outermost value, the mean of 1 - 1/30 and 1 - 1/32 as the published table rounds it."""


class Nf4(NamedTuple):
    """A tensor in NF4.

    Args:
        packed: [ceil(n / 2)] uint8, two codes a byte, the first in the high half.
        scales: [ceil(n / 64)] float32, largest magnitude of each block.
        shape: of the tensor.
    """

    packed: Tensor
    scales: Tensor
    shape: torch.Size


class Scales8(NamedTuple):
    """Scales in 8 bits.

    Args:
        codes: [scales] uint8, places on `dynamic_table`.
        outer: [ceil(scales / 256)] float32, largest magnitude of each block of scales less their mean.
        mean: of all scales, float32.
    """

    codes: Tensor
    outer: Tensor
    mean: Tensor


def nf4_table() -> Tensor:
    """The sixteen values of NF4, ascending from -1 to 1: [16] float32 (QLoRA, App. E).

    Eight quantiles above the median and seven below it, with the median itself, so that zero is a value; divided by the
    largest.
    """
    # Rounded to float32 where the published table was: any other order moves some values by a last bit or two.
    above, below = (torch.linspace(LARGEST_QUANTILE, 0.5, steps)[:-1].double() for steps in (9, 8))
    values = torch.cat([-torch.special.ndtri(below), torch.zeros(1), torch.special.ndtri(above)]).float().sort().values
    return values / values.max()


def dynamic_table() -> Tensor:
    """The 256 values of the signed 8-bit dynamic data type, ascending: [256] float32 (Dettmers 2016).

    One bit is the sign; the zeros before the next set bit are the power of ten, and the bits behind it divide the
    interval from a tenth to one into equal parts, whose middles are the values. Zero and one complete the table.
    """
    values = [torch.tensor([0.0, 1.0])]
    for bits in range(7):
        edges = torch.linspace(0.1, 1.0, 2**bits + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (bits - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values


def quantize(weight: Tensor, table: Tensor) -> Nf4:
    """A tensor in blocks of 64, each divided by its largest magnitude, at the nearest values of a table.

    A number in the middle between two values goes to the lower one. A block of zeros stays zero.

    Args:
        weight: of any shape; finite.
        table: [16] float32 ascending, such as `nf4_table()`.
    """
    scaled, scales = _divided(weight, BLOCK)
    # An odd number of codes is filled up with that of zero, which the block was filled up with.
    halves = _nearest(scaled, table)[: weight.numel() + weight.numel() % 2].reshape(-1, 2)  # [n / 2, 2]
    return Nf4(halves[:, 0] << 4 | halves[:, 1], scales, weight.shape)


def dequantize(stored: Nf4, table: Tensor) -> Tensor:
    """The tensor that codes and scales stand for, float32, in its shape."""
    codes = torch.stack([stored.packed >> 4, stored.packed & 15], dim=1).flatten()[: stored.shape.numel()]
    scales = stored.scales.repeat_interleave(BLOCK)[: len(codes)]
    return (table[codes.long()] * scales).reshape(stored.shape)


def quantize_scales(scales: Tensor) -> Scales8:
    """Scales less their mean in blocks of 256, at the nearest values of the 8-bit dynamic data type.

    Args:
        scales: [scales] float32.
    """
    mean = scales.mean()
    scaled, outer = _divided(scales - mean, OUTER_BLOCK)
    return Scales8(_nearest(scaled, dynamic_table())[: len(scales)], outer, mean)


def dequantize_scales(stored: Scales8) -> Tensor:
    """The scales that 8-bit codes stand for: [scales] float32."""
    outer = stored.outer.repeat_interleave(OUTER_BLOCK)[: len(stored.codes)]
    return dynamic_table()[stored.codes.long()] * outer + stored.mean


def _divided(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(values over the largest magnitude of their block, padded with zeros to whole blocks; the magnitudes)."""
    flat = values.flatten().to(torch.float32)
    blocks = pad(flat, (0, -len(flat) % block)).reshape(-1, block)  # [blocks, block]
    largest = blocks.abs().amax(dim=1)
    return (blocks / largest.where(largest > 0, torch.ones(()))[:, None]).flatten(), largest


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Places of the nearest values of an ascending table: [n] uint8."""
    middles = (table[:-1] + table[1:]) / 2
    return torch.bucketize(values, middles).to(torch.uint8)
