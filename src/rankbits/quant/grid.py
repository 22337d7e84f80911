"""The grids: which bit widths exist, which side of zero they cover, and how coarse a step is.

A grid of width b over the range beta has the step `(2 beta or beta) / (2^b - 1)`. Steps divide each other
(s_4 = s_2 / 5, s_8 = s_4 / 17, s_16 = s_8 / 257), so that every grid contains the coarser ones: Bayesian-LoRA, Eq. 4;
van Baalen et al. 2020. No step is ever zero: below the smallest normal number it is held there.

Such a grid has as many codes below zero as above, one fewer than b bits can tell apart. Where a weight stays at one
width its grid can be full: it has the code -2^(b-1), too, which a negative range puts above zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

BIT_WIDTHS = (2, 4, 8, 16, 32)
GATED_WIDTHS = BIT_WIDTHS[1:]
"""The widths that have a gate each; 2 bits are always on."""
STEP_DIVISORS = tuple(2 ** (b // 2) + 1 for b in GATED_WIDTHS)
"""What a step is divided by to get the next finer one: 5, 17, 257, 65537."""
RESIDUAL_BOUNDS = tuple(2 ** (b // 2 - 1) for b in GATED_WIDTHS)
"""Largest absolute integer code of the residual at each gated width: 2, 8, 128, 32768."""
COARSEST_CODES = {True: (-1, 1), False: (0, 3)}
"""Smallest and largest integer code at 2 bits, by whether the grid is signed."""
UNROUNDED_WIDTH = 32
"""At this width a tensor is clipped but not rounded: its step is below the resolution of float32."""


class Signedness(str, Enum):
    """Which side of zero a range covers; `AUTO` is decided by the values seen in calibration.

    An `AFFINE` range begins wherever it is best once that is known, and has all codes of its width from there on.
    """

    SIGNED = "signed"
    UNSIGNED = "unsigned"
    AUTO = "auto"
    AFFINE = "affine"


class Granularity(str, Enum):
    """How many elements of a tensor share one range."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"


@dataclass(frozen=True)
class RangeLayout:
    """How a weight [out, in], or what a layer reads [..., in], falls into parts with one range each.

    Args:
        granularity: one range for the whole tensor, for each output channel (row of a weight), or for each group of
            consecutive inputs: of a row of a weight, or the same for all rows of what is read.
        group_size: elements of a group; meaningful for groups alone.
        scale_bits: bits that the step of each part is stored in once there is a single width: 32, 16 or 8
            (`quant.scales`).
    """

    granularity: Granularity = Granularity.TENSOR
    group_size: int = 64
    scale_bits: int = 32

    def parts(self, x: Tensor) -> Tensor:
        """A view of `x` over which ranges of `range_shape` broadcast.

        Raises:
            ValueError: groups that do not divide the rows of `x`.
        """
        if self.granularity is not Granularity.GROUP:
            return x
        self._check(x.shape[-1])
        parts: Tensor = x.unflatten(-1, (-1, self.group_size))
        return parts

    def range_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the ranges: (1,), (out, 1) or, in groups, (out, in / group_size, 1).

        Args:
            shape: (out, in) of a weight; (in,) of what a layer reads, whose groups have ranges (in / group_size, 1).
        """
        if self.granularity is Granularity.TENSOR:
            return (1,)
        if self.granularity is Granularity.CHANNEL:
            return (shape[0], 1)
        self._check(shape[-1])
        return (*shape[:-1], shape[-1] // self.group_size, 1)

    def magnitudes(self, x: Tensor) -> Tensor:
        """Largest absolute value of each part, of `range_shape`."""
        if self.granularity is Granularity.TENSOR:
            return x.abs().amax().reshape(1)
        return self.parts(x).abs().amax(dim=-1, keepdim=True)

    def _check(self, inputs: int) -> None:
        if inputs % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide rows of {inputs} inputs")


PER_TENSOR = RangeLayout()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The floating type that quantization of a tensor computes in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def coarsest_step(range_: Tensor, *, signed: bool) -> Tensor:
    """Step of the 2-bit grid, s_2, in the units of `range_` and of its shape."""
    return hold_step(range_ / (1.5 if signed else 3.0))


def hold_step(step: Tensor) -> Tensor:
    """Keep a step at least the smallest normal number away from zero, so that no quotient by it is infinite or NaN."""
    tiny = torch.finfo(step.dtype).tiny
    return torch.where(step < 0, step.clamp(max=-tiny), step.clamp(min=tiny))


def covering_logarithm(largest: Tensor) -> Tensor:
    """Logarithms whose exponentials are not below `largest`, float32 and positive.

    Rounded down, half of them would leave the largest value just outside its range, where it gets no gradient: in
    groups of 8 that is every sixteenth number.
    """
    logarithms = largest.log()
    short = logarithms.exp() < largest
    return torch.where(short, logarithms + logarithms.abs().clamp(min=1.0) * 2.0**-22, logarithms)


def expected_bits(link_probabilities: Tensor) -> Tensor:
    """Expected bit width of a chain of width gates.

    Args:
        link_probabilities: [..., 4] probability that the grid is at least 4, 8, 16 and 32 bits wide.

    Returns:
        [...] bits between 2 and 32: 2 + 2 p_4 + 4 p_8 + 8 p_16 + 16 p_32.
    """
    gains = [float(b - b // 2) for b in GATED_WIDTHS]
    return 2.0 + (link_probabilities * link_probabilities.new_tensor(gains)).sum(dim=-1)


def bits_of_gates(open_gates: Tensor) -> Tensor:
    """Bit width that a hard, chained set of width gates stands for.

    Args:
        open_gates: [..., 4] bool, no gate open behind a closed one.

    Returns:
        [...] int64 tensor of values 2, 4, 8, 16 or 32.
    """
    return torch.pow(2, 1 + open_gates.to(torch.int64).sum(dim=-1))
