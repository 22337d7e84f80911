"""Ranges of activations at the widths that were learned, by what they look like in given passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rankbits.quant.quantizer import Quantizer
from rankbits.quant.range_fit import RangeFit
from rankbits.training.passes import Passes, run_again
from rankbits.training.processes import Reduction, agree
from rankbits.tuners.bayesian_lora import learning_adapters


def fitted_quantizers(model: nn.Module) -> list[Quantizer]:
    """The quantizers of activations whose ranges are fitted once their width is known."""
    found = [q for layer, name, _ in learning_adapters(model) for q in layer.quantizers_of(name).values()]
    return [quantizer for quantizer in found if isinstance(quantizer, Quantizer) and quantizer.fits_passes]


def fit_activation_ranges(model: nn.Module, quantizers: Sequence[Quantizer], passes: Passes) -> None:
    """Give activations the ranges that round them with the least squared error in these passes, over all processes.

    All are judged by what they read while the others have the ranges that they had.

    Args:
        model: it is run once in evaluation, with the gates of inference; its mode stays as it was.
        quantizers: those that have no range yet are left alone.
        passes: inputs of the model.
    """
    fits = [RangeFit(quantizer) for quantizer in quantizers if quantizer.is_calibrated]
    if not fits:
        return
    handles = []
    for fit in fits:

        def see(_: nn.Module, args: tuple[Any, ...], fit: RangeFit = fit) -> None:
            fit.see(*args)

        handles.append(fit.quantizer.register_forward_pre_hook(see))
    try:
        run_again(model, passes)
    finally:
        for handle in handles:
            handle.remove()
    agree([fit.errors for fit in fits], Reduction.MEAN)
    for fit in fits:
        fit.settle()
