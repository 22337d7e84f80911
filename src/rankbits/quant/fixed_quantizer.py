"""What hardening leaves of a quantizer, and the rounding at one width that it shares with one that learns."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rankbits.quant.codes import round_to_grid, step_at
from rankbits.quant.float32_state import Float32State
from rankbits.quant.grid import PER_TENSOR, Granularity, RangeLayout, compute_dtype


class FixedQuantizer(Float32State):
    """A quantizer whose width and range were decided: what hardening leaves.

    Args:
        bits: 2, 4, 8, 16 or 32.
        signed: whether the grid covers both sides of zero.
        layout: which elements share a range.
        shape: where ranges are finer than the tensor or codes are offset, shape of the weight, or (in,) of what a
            layer reads.
        compensated: whether codes of a weight can be offset from the nearest ones.
        full: whether the grid has all codes of its width, and ranges of either sign.
        affine: whether each range begins at a low end of its own.
    """

    fixed_range: Tensor
    offsets: Tensor | None
    lows: Tensor | None
    is_calibrated = True
    fits_passes = False

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        layout: RangeLayout = PER_TENSOR,
        shape: tuple[int, ...] = (),
        compensated: bool = False,
        full: bool = False,
        affine: bool = False,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.is_signed = signed
        self.layout = layout
        self.full = full
        ranges = () if layout.granularity is Granularity.TENSOR else layout.range_shape(shape)
        self.register_buffer("fixed_range", torch.ones(ranges, dtype=torch.float32))
        self.register_buffer("offsets", torch.zeros(shape, dtype=torch.int8) if compensated else None)
        self.register_buffer("lows", torch.zeros(ranges, dtype=torch.float32) if affine else None)

    @property
    def low_(self) -> Tensor | None:
        """Where each range begins, of the shape of `fixed_range`; None where all lie around zero or begin there."""
        return self.lows

    @property
    def range_count(self) -> int:
        """How many ranges there are: what is stored beside the codes."""
        return self.fixed_range.numel()

    @property
    def bound_count(self) -> int:
        """How many numbers are kept of the ranges: their low ends are, too, where they have any."""
        return self.range_count * (1 if self.lows is None else 2)

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` to the grid; the result has its shape and dtype."""
        return round_with_offsets(self, x, self.fixed_range, self.bits)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"bits={self.bits}, {'signed' if self.is_signed else 'unsigned'}"


class OnGrid(Protocol):
    """What rounding at one width needs to know of a quantizer."""

    layout: RangeLayout
    offsets: Tensor | None
    full: bool

    @property
    def is_signed(self) -> bool:
        """Whether the grid covers both sides of zero, or of its low end."""

    @property
    def low_(self) -> Tensor | None:
        """Where each range begins; None where all lie around zero or begin there."""


def round_with_offsets(quantizer: OnGrid, x: Tensor, range_: Tensor, bits: Tensor | int) -> Tensor:
    """`x` at one width, each code as far from the nearest one as its offset says; of the shape and dtype of `x`."""
    parts, signed, low = quantizer.layout.parts(x), quantizer.is_signed, quantizer.low_
    if low is not None:
        parts = parts.to(compute_dtype(x.dtype)) - low
    if quantizer.offsets is not None:
        beta = range_.to(compute_dtype(x.dtype))
        parts = parts.to(beta.dtype) + quantizer.layout.parts(quantizer.offsets) * step_at(beta, bits, signed=signed)
    rounded = round_to_grid(parts, range_, bits, signed=signed, full=quantizer.full)
    return (rounded if low is None else rounded + low).to(x.dtype).reshape(x.shape)
