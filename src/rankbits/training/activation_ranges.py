"""Ranges of activations at the widths that are learned, by what the activations look like in given passes.

While widths are judged each range lies at the largest magnitude, and what a width costs is measured with the error that
it makes there. Of that error fitted ranges leave a part, which differs from tensor to tensor: so the fit is worked out
for all widths before one is chosen, and what was measured is taken for what will be delivered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rankbits.quant.grid import bits_of_gates
from rankbits.quant.quantizer import Quantizer
from rankbits.quant.range_fit import FITTED_WIDTHS, RangeFit
from rankbits.training.passes import Passes, run_again
from rankbits.training.processes import Reduction, agree
from rankbits.tuners.bayesian_lora import learning_adapters
from rankbits.tuners.bayesian_lora.config import Site

Fits = Mapping[Quantizer, RangeFit]


def fitted_quantizers(model: nn.Module) -> list[Quantizer]:
    """The quantizers of activations whose ranges are fitted once their width is known."""
    found = [q for layer, name, _ in learning_adapters(model) for q in layer.quantizers_of(name).values()]
    return [quantizer for quantizer in found if isinstance(quantizer, Quantizer) and quantizer.fits_passes]


def range_fits(model: nn.Module, passes: Passes) -> Fits:
    """What each range that is tried would cost in these passes, over all processes.

    All are judged by what they read while nothing else has changed.

    Args:
        model: it is run once in evaluation, with the gates of inference; its mode stays as it was.
        passes: inputs of the model.

    Returns:
        By quantizer, those without a range yet left out.
    """
    fits = {quantizer: RangeFit(quantizer) for quantizer in fitted_quantizers(model) if quantizer.is_calibrated}
    handles = [quantizer.register_forward_pre_hook(_see(fit)) for quantizer, fit in fits.items()]
    try:
        run_again(model, passes)
    finally:
        for handle in handles:
            handle.remove()
    agree([fit.errors for fit in fits.values()], Reduction.MEAN)
    return fits


@torch.no_grad()
def expect_fitted_ranges(model: nn.Module, fits: Fits) -> None:
    """Scale the evidence of each gate by the share of its error that ranges leave once they are fitted.

    The evidence of a gate is a mean square, like the error of the width that is left when it closes. Weights, whose
    ranges are fitted in any case, are treated alike, so that they and activations remain in one unit.
    """
    for layer, name, gates in learning_adapters(model):
        if not bool(gates.evidence.any()):
            continue
        rows, quantizers = layer.rows_of(name), layer.quantizers_of(name)
        for row, site in enumerate(rows):
            quantizer = quantizers.get(site.value)
            left = torch.ones(len(FITTED_WIDTHS))
            if isinstance(quantizer, Quantizer) and quantizer in fits:
                left = fits[quantizer].errors_left()
            elif site is Site.WEIGHT:
                left = torch.tensor([layer.error_left_by_fit(name, bits) for bits in FITTED_WIDTHS])
            # The gate at a position closes to the width at that position.
            gates.evidence[row, : len(left)] *= left.to(gates.evidence.device)


def settle_ranges(model: nn.Module, fits: Fits) -> None:
    """Give each activation the range that suits the width it has by the gates of inference."""
    for layer, name, _ in learning_adapters(model):
        for site, quantizer in layer.quantizers_of(name).items():
            decided = layer.gate_of(name, Site(site))
            if isinstance(quantizer, Quantizer) and quantizer in fits and decided is not None:
                gates, row = decided
                fits[quantizer].settle(int(bits_of_gates(gates.widths_of(row, hard=True))))


def _see(fit: RangeFit) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _, args: fit.see(args[0])
