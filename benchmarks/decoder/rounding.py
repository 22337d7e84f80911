"""Rounding after training: symmetric grids with one scale for each group of weights, as good as their error allows."""

from __future__ import annotations

import torch
from points import Grid
from torch import Tensor, nn

from rankbits.quant.scales import stored_steps

SHRINKS = tuple(1.0 - 0.05 * step for step in range(13))
"""Scales that are tried, as shares of the largest magnitude in a group: clipping a little may round the rest better."""


def rounded(weight: Tensor, bits: int, grid: Grid) -> Tensor:
    """A weight [out, in] on a grid of 2^bits levels, each group of weights of a row with its own scale.

    The scale of a group, of either sign, is the one of SHRINKS, as it can be stored, with the least squared error.
    ValueError if groups do not fit into rows.
    """
    if weight.shape[1] % grid.group:
        raise ValueError(f"rows of {weight.shape[1]} weights, expected a multiple of {grid.group}")
    parts = weight.reshape(-1, grid.group)  # [groups, group]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest = parts.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)  # [groups, 1]
    best, least = torch.zeros_like(parts), torch.full_like(largest, torch.inf)
    for shrink in SHRINKS:
        for levels in (high, -low, low, -high):
            scale = shrink * largest / levels
            scale = scale if grid.scale_bits == 32 else stored_steps(scale, grid.scale_bits)
            tried = (parts / scale).round().clamp(low, high) * scale  # [groups, group]
            error = (tried - parts).square().sum(dim=1, keepdim=True)  # [groups, 1]
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best.reshape(weight.shape)


def round_model(layers: dict[str, nn.Linear], bits: float, grid: Grid) -> dict[str, int]:
    """Round the weights of linear layers in place, to a mean width over all weights of at most `bits`.

    Between two whole widths, the layers whose squared error falls most per bit spent get the wider one.

    Returns:
        The width of each layer.
    """
    low = int(bits)
    widths = dict.fromkeys(layers, low)
    narrow = {name: rounded(layer.weight.data, low, grid) for name, layer in layers.items()}
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    spare = (bits - low) * sum(sizes.values())
    wide = {name: rounded(layer.weight.data, low + 1, grid) for name, layer in layers.items()} if spare else {}
    for name in sorted(wide, key=lambda name: -_gain(layers[name].weight.data, narrow[name], wide[name])):
        if sizes[name] <= spare:
            spare -= sizes[name]
            widths[name] = low + 1
    for name, layer in layers.items():
        layer.weight.data.copy_(narrow[name] if widths[name] == low else wide[name])
    return widths


def _gain(weight: Tensor, narrow: Tensor, wide: Tensor) -> float:
    """How much less squared error a weight has with one more bit: mean over its elements."""
    return float((narrow - weight).square().mean() - (wide - weight).square().mean())


def stored_bytes(weights: int, mean_bits: float, grid: Grid) -> float:
    """Bytes of weights at a mean width, with a scale for each group."""
    return weights * (mean_bits + grid.scale_bits / grid.group) / 8
