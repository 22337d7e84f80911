"""With which range an activation is rounded best at each width, judged by the values that some passes show."""

from __future__ import annotations

import torch
from torch import Tensor

from rankbits.quant.codes import round_to_grid
from rankbits.quant.grid import BIT_WIDTHS
from rankbits.quant.quantizer import Quantizer

FACTORS = tuple(2.0 ** (-step / 4.0) for step in range(-4, 25))
"""Ranges that are tried, in units of the present one: from twice to a 64th of it, each 16 % below the one before."""
PRESENT = FACTORS.index(1.0)
FITTED_WIDTHS = BIT_WIDTHS[:3]
"""Widths at which a range is chosen. From 16 bits on there are so many codes that nothing is gained by clipping."""
ROWS = 64
"""Rows of a pass that are looked at, drawn at random."""


class RangeFit:
    """Adds up what rounding costs with each range that is tried, and takes the one that costs least.

    An activation that is calibrated to its largest magnitude spends its codes on a few outliers: of 15 codes at 4 bits
    all but one or two can stay idle. What counts is the squared error over all values, so that those beyond the range,
    which are clipped, weigh by how far they lie beyond it.

    Args:
        quantizer: of an activation, calibrated.
        seed: of the rows that are drawn; the default generator is left alone.
    """

    def __init__(self, quantizer: Quantizer, seed: int = 0) -> None:
        self.quantizer = quantizer
        shape = (len(FITTED_WIDTHS), len(FACTORS), quantizer.range_count)
        self.errors = torch.zeros(shape, device=quantizer.log_range.device)
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Add the squared errors of one pass, x [..., features]."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if len(rows) > ROWS:
            drawn = torch.randint(len(rows), (ROWS,), generator=self._generator)
            rows = rows[drawn.to(rows.device)]
        parts = rows.to(torch.float32).reshape(len(rows), self.quantizer.range_count, -1)
        factors = torch.tensor(FACTORS, device=parts.device)[:, None, None, None]
        ranges = self.quantizer.range_.reshape(-1, 1) * factors  # [factors, 1, ranges, 1]
        for position, bits in enumerate(FITTED_WIDTHS):
            rounded = round_to_grid(parts, ranges, bits, signed=self.quantizer.is_signed)
            self.errors[position] += (rounded - parts).square().sum(dim=(1, 3))  # [factors, ranges]

    def errors_left(self) -> Tensor:
        """[widths] squared error with the best ranges over that with the present ones; 1 where there is none now."""
        present = self.errors[:, PRESENT].sum(dim=1)
        best = self._finite().amin(dim=1).sum(dim=1)
        known = present.isfinite() & (present > 0.0)
        return torch.where(known, best / torch.where(known, present, 1.0), 1.0)

    @torch.no_grad()
    def settle(self, bits: int) -> None:
        """Give the quantizer the ranges with the least error at a width, where that is less than with its own.

        Args:
            bits: above `FITTED_WIDTHS` the ranges stay.
        """
        if bits not in FITTED_WIDTHS:
            return
        errors = self._finite()[FITTED_WIDTHS.index(bits)]  # [factors, ranges]
        least, best = errors.min(dim=0)
        factors = torch.tensor(FACTORS, device=best.device)[best]
        factors = torch.where(least < errors[PRESENT], factors, 1.0)
        log_range = self.quantizer.log_range
        log_range.add_(factors.log().reshape(log_range.shape))

    def _finite(self) -> Tensor:
        return torch.where(self.errors.isfinite(), self.errors, torch.inf)
