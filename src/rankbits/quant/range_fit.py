"""With which range an activation is rounded best, judged by the values that some passes show."""

from __future__ import annotations

import torch
from torch import Tensor

from rankbits.quant.codes import round_to_grid
from rankbits.quant.grid import bits_of_gates
from rankbits.quant.quantizer import Quantizer

FACTORS = tuple(2.0 ** (-step / 4.0) for step in range(25))
"""Ranges that are tried, in units of the present one: down to a 64th of it, each 16 % below the one before."""
ROWS = 256
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
        self.errors = torch.zeros(len(FACTORS), device=quantizer.log_range.device)
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def see(self, x: Tensor, gates: Tensor) -> None:
        """Add the squared errors of one pass.

        Args:
            x: [..., features], what the quantizer rounds.
            gates: [4] bool, its hard, chained width gates.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if len(rows) > ROWS:
            drawn = torch.randint(len(rows), (ROWS,), generator=self._generator)
            rows = rows[drawn.to(rows.device)]
        rows = rows.to(torch.float32)
        bits, signed = bits_of_gates(gates), self.quantizer.is_signed
        for position, factor in enumerate(FACTORS):
            rounded = round_to_grid(rows, self.quantizer.range_ * factor, bits, signed=signed)
            self.errors[position] += (rounded - rows).square().sum()

    @torch.no_grad()
    def settle(self) -> None:
        """Give the quantizer the range with the least error, the widest of equals, or its own if none is finite."""
        errors = torch.where(self.errors.isfinite(), self.errors, torch.inf)
        factors = torch.tensor(FACTORS, device=errors.device)
        self.quantizer.log_range.add_(factors[errors.argmin()].log())
