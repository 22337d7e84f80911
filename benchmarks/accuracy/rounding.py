"""Post-training rounding in its plainest form: symmetric, one scale per tensor, channel or group, nearest code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from rankbits.quant.scales import stored_steps


class Scales(str, Enum):
    """Which weights of a matrix share a scale: all, those of an output, or consecutive inputs of an output."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"


class Fit(str, Enum):
    """How a scale is chosen: the largest magnitude gets the largest code, or the squared error is least.

    With all 2^bits codes of a width, scales may be negative: the code -2^(bits-1) lies on the side that needs it.
    """

    MAXIMUM = "max"
    ERROR = "mse"
    ALL_CODES = "mse-full"


@dataclass(frozen=True)
class Scheme:
    """One way to round a model.

    Args:
        weight_bits: width of weights, 2 to 8: codes -(2^(bits-1) - 1) to 2^(bits-1) - 1, and one more below with
            `Fit.ALL_CODES`.
        input_bits: width of the inputs of the rounded layers, likewise.
        scales: which weights share a scale.
        group_size: inputs of a group.
        fit: how the scales of weights are chosen.
        scale_bits: 32, or what a scale is stored in; with `Fit.ALL_CODES` alone, which tries scales as they are stored.
    """

    weight_bits: int
    input_bits: int
    scales: Scales
    group_size: int = 64
    fit: Fit = Fit.MAXIMUM
    scale_bits: int = 32

    @property
    def name(self) -> str:
        """Such as w4a8-group64-max."""
        grid = f"group{self.group_size}" if self.scales is Scales.GROUP else self.scales.value
        stored = "" if self.scale_bits == 32 else f"-scale{self.scale_bits}"
        return f"w{self.weight_bits}a{self.input_bits}-{grid}{stored}-{self.fit.value}"


SHRINKS = tuple(1.0 - 0.02 * step for step in range(36))
"""Candidates for the clipped range, relative to the largest magnitude, where the squared error decides."""


def largest_code(bits: int) -> int:
    """2^(bits-1) - 1."""
    return (1 << (bits - 1)) - 1


def on_grid(values: Tensor, scale: Tensor, bits: int, *, full: bool = False) -> Tensor:
    """Nearest multiple of the scale, ties to even, within the codes of the width; of the shape of `values`."""
    bound = largest_code(bits)
    return torch.clamp(torch.round(values / scale), -bound - full, bound) * scale


def rounded_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    """A weight [out, in] on its grid. ValueError if groups do not divide the inputs."""
    view = grouped(weight, scheme)  # [tensors, elements that share a scale]
    scale = view.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / largest_code(scheme.weight_bits)
    full = scheme.fit is Fit.ALL_CODES
    best = on_grid(view, _stored(scale, scheme), scheme.weight_bits, full=full)
    if scheme.fit is not Fit.MAXIMUM:
        least = (best - view).square().sum(dim=1, keepdim=True)
        for shrink in (*SHRINKS[1:], *(-shrink for shrink in SHRINKS if full)):
            tried = on_grid(view, _stored(shrink * scale, scheme), scheme.weight_bits, full=full)
            error = (tried - view).square().sum(dim=1, keepdim=True)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best.reshape(weight.shape)  # [out, in]


def _stored(scale: Tensor, scheme: Scheme) -> Tensor:
    return scale if scheme.scale_bits == 32 else stored_steps(scale, scheme.scale_bits)


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """[scales, elements] of a weight [out, in]."""
    if scheme.scales is Scales.TENSOR:
        return weight.reshape(1, -1)
    if scheme.scales is Scales.CHANNEL:
        return weight
    if weight.shape[1] % scheme.group_size:
        raise ValueError(f"groups of {scheme.group_size} do not divide {weight.shape[1]} inputs")
    return weight.reshape(-1, scheme.group_size)


def scale_count(shape: tuple[int, int], scheme: Scheme) -> int:
    """How many scales a weight [out, in] needs."""
    if scheme.scales is Scales.TENSOR:
        return 1
    return shape[0] if scheme.scales is Scales.CHANNEL else shape[0] * shape[1] // scheme.group_size


@dataclass(frozen=True)
class Seen:
    """What a layer's inputs were in calibration.

    Args:
        maximum: largest magnitude of all rows.
        percentile: the largest of the batches' 99.9th percentiles of the magnitude.
    """

    maximum: float
    percentile: float


@contextmanager
def watching(layers: dict[str, nn.Linear]) -> Iterator[dict[str, Seen]]:
    """Record the magnitudes of the layers' inputs while the model runs in the block."""
    seen: dict[str, Seen] = {}

    def record(name: str, x: Tensor) -> None:
        magnitudes = x.detach().abs().flatten()
        rank = max(1, round(0.999 * magnitudes.numel()))
        before = seen.get(name, Seen(0.0, 0.0))
        percentile = float(magnitudes.kthvalue(rank).values)
        seen[name] = Seen(max(before.maximum, float(magnitudes.max())), max(before.percentile, percentile))

    handles = [
        layer.register_forward_pre_hook(lambda _module, inputs, name=name: record(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rounded_layers(layers: dict[str, nn.Linear], ranges: dict[str, float], scheme: Scheme) -> Iterator[None]:
    """Round the weights and the inputs of the layers inside the block; afterwards they are as they were.

    Args:
        layers: linear layers by name.
        ranges: largest magnitude that the inputs of each keep.
        scheme: widths and scales.
    """
    kept = {name: layer.weight.data for name, layer in layers.items()}
    bits = scheme.input_bits
    handles = []
    for name, layer in layers.items():
        layer.weight.data = rounded_weight(kept[name], scheme)
        scale = torch.tensor(ranges[name] / largest_code(bits))
        handles.append(
            layer.register_forward_pre_hook(
                lambda _module, inputs, scale=scale: (on_grid(inputs[0], scale, bits), *inputs[1:])
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.weight.data = kept[name]
