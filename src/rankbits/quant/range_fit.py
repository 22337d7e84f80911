"""With which range an activation is rounded best at each width, judged by the values that some passes show."""

from __future__ import annotations

import torch
from torch import Tensor

from rankbits.quant.codes import round_to_grid
from rankbits.quant.grid import BIT_WIDTHS
from rankbits.quant.quantizer import Quantizer
from rankbits.quant.weight_fit import RANGE_FLOOR

FACTORS = tuple(2.0 ** (-step / 4.0) for step in range(-4, 25))
"""Ranges around zero that are tried, in units of the present one: from twice to a 64th, each 16 % below the last."""
SHARES = tuple(2.0 ** (-step / 4.0) for step in range(25))
"""Shares of all values' range that are tried as an affine one; what is cut off lies as its ends do about the mean."""
FITTED_WIDTHS = BIT_WIDTHS[:3]
"""Widths at which a range is chosen. From 16 bits on there are so many codes that nothing is gained by clipping."""
ROWS = 64
"""Rows of a pass that are looked at, drawn at random."""


class RangeFit:
    """Adds up what rounding costs with each range that is tried, and takes the one that costs least.

    An activation that is calibrated to its largest magnitude spends its codes on a few outliers: of 15 codes at 4 bits
    all but one or two can stay idle. What counts is the squared error over all values, so that those beyond the range,
    which are clipped, weigh by how far they lie beyond it. Affine ranges are shares of all that the values span, so
    that passes are seen twice: `look` at all of them comes before `see`.

    Args:
        quantizer: of an activation, calibrated.
        seed: of the rows that are drawn; the default generator is left alone.
    """

    def __init__(self, quantizer: Quantizer, seed: int = 0) -> None:
        self.quantizer = quantizer
        self.affine = quantizer.lows is not None
        count, device = quantizer.range_count, quantizer.log_range.device
        self.present = torch.zeros(len(FITTED_WIDTHS), count, device=device)
        self.errors = torch.zeros(len(FITTED_WIDTHS), len(SHARES if self.affine else FACTORS), count, device=device)
        self.ends = torch.full((2, count), -torch.inf, device=device)
        """How far values go below zero and above it."""
        self.totals = torch.zeros(2, count, device=device)
        """Sum and number of values."""
        self._looks, self._sights = (torch.Generator().manual_seed(seed) for _ in range(2))

    @torch.no_grad()
    def look(self, x: Tensor) -> None:
        """Take note of what the values of one pass, x [..., features], span; needed where ranges are affine alone."""
        if x.numel() == 0:
            return
        parts = self._drawn(x, self._looks)
        ends = torch.stack([(-parts).amax(dim=(0, 2)), parts.amax(dim=(0, 2))])
        torch.maximum(self.ends, ends, out=self.ends)
        numbers = torch.full_like(ends[0], parts.shape[0] * parts.shape[2])
        self.totals += torch.stack([parts.sum(dim=(0, 2)), numbers])

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Add the squared errors of one pass, x [..., features]."""
        if x.numel() == 0:
            return
        parts = self._drawn(x, self._sights)
        signed = self.quantizer.is_signed
        present = self.quantizer.range_.reshape(-1, 1)
        lows, ranges = self._tried()
        above = parts if lows is None else parts - lows[:, None, :, None]  # [(tried,) rows, ranges, features]
        for position, bits in enumerate(FITTED_WIDTHS):
            self.present[position] += _errors(parts, present, bits, signed=signed)
            self.errors[position] += _errors(above, ranges[:, None, :, None], bits, signed=signed and lows is None)

    def errors_left(self) -> Tensor:
        """[widths] squared error with the best ranges over that with the present ones; 1 where there is none now."""
        least = self._finite().amin(dim=1)
        best = torch.where(least.isfinite(), least, self.present).sum(dim=1)
        present = self.present.sum(dim=1)
        known = present.isfinite() & (present > 0.0)
        return torch.where(known, best / torch.where(known, present, 1.0), 1.0)

    @torch.no_grad()
    def settle(self, bits: int) -> None:
        """Give the quantizer the ranges with the least error at a width.

        Around zero it keeps its own where that is not more. Affine ones are the best of those that are tried, and the
        present ones with a low end where nothing finite was seen: either all ranges have a low end or none.

        Args:
            bits: above `FITTED_WIDTHS` the ranges stay.
        """
        if bits not in FITTED_WIDTHS:
            return
        position = FITTED_WIDTHS.index(bits)
        least, best = self._finite()[position].min(dim=0)
        lows, ranges = self._tried()
        present = self.quantizer.range_.reshape(-1)
        chosen = ranges.gather(0, best[None])[0]
        if lows is None:
            self.quantizer.settle(torch.where(least < self.present[position], chosen, present))
            return
        low = -present if self.quantizer.is_signed else torch.zeros_like(present)
        known = least.isfinite() & (self.totals[1] > 0.0)
        lows = torch.where(known, lows.gather(0, best[None])[0], low)
        self.quantizer.settle(torch.where(known, chosen, present - low), lows)

    def _drawn(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """[rows, ranges, features] of `ROWS` rows of a pass, float32."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if len(rows) > ROWS:
            drawn = torch.randint(len(rows), (ROWS,), generator=generator)
            rows = rows[drawn.to(rows.device)]
        return rows.to(torch.float32).reshape(len(rows), self.quantizer.range_count, -1)

    def _tried(self) -> tuple[Tensor | None, Tensor]:
        """Low ends, if ranges have them, and ranges that are tried, [tried, ranges]."""
        if not self.affine:
            return None, _column(FACTORS, self.ends) * self.quantizer.range_.reshape(-1)
        mean = self.totals[0] / self.totals[1]
        low, high = -self.ends[0], self.ends[1]
        shares = _column(SHARES, mean)
        return mean + shares * (low - mean), (shares * (high - low)).clamp(min=RANGE_FLOOR)

    def _finite(self) -> Tensor:
        return torch.where(self.errors.isfinite(), self.errors, torch.inf)


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None]


def _errors(parts: Tensor, ranges: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Squared errors of rounding, summed over rows and features: [(tried,) ranges]."""
    return (round_to_grid(parts, ranges, bits, signed=signed) - parts).square().sum(dim=(-3, -1))
