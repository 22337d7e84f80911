"""Ranges of activations at the widths that are learned, by what the activations look like in given passes.

Under a budget whose gates are chosen by evidence each range lies at the largest magnitude while widths are judged, and
what a width costs is measured with the error that it makes there. Of that error fitted ranges leave a part, which
differs from tensor to tensor: so the fit is worked out for all widths before one is chosen, and what was measured is
taken for what will be delivered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankbits.quant.grid import bits_of_gates
from rankbits.quant.quantizer import Quantizer
from rankbits.quant.range_fit import FITTED_WIDTHS, RangeFit
from rankbits.training.compensation import awaiting_codes
from rankbits.training.passes import Passes, run_again
from rankbits.training.processes import Reduction, agree
from rankbits.tuners.bayesian_lora import BayesianLoraLinear, learning_adapters
from rankbits.tuners.bayesian_lora.config import Site

Fits = Mapping[nn.Module, RangeFit]
"""By the quantizer whose range is fitted."""


def fitted_quantizers(model: nn.Module) -> list[Quantizer]:
    """The quantizers of activations whose ranges are fitted once their width is known."""
    return [quantizer for quantizer in _quantizers(model) if quantizer.fits_passes]


def _quantizers(model: nn.Module) -> Iterator[Quantizer]:
    for layer, name, _ in learning_adapters(model):
        yield from (q for q in layer.quantizers_of(name).values() if isinstance(q, Quantizer))


def range_fits(model: nn.Module, passes: Passes) -> Fits:
    """What each range that is tried would cost in these passes, over all processes.

    Nothing is rounded in them, so that what is fitted does not depend on what has been chosen already.

    Args:
        model: it is run in evaluation, twice if there are affine ranges; its mode stays as it was.
        passes: inputs of the model.

    Returns:
        By quantizer, those without a range yet left out.
    """
    calibrated = [quantizer for quantizer in fitted_quantizers(model) if quantizer.is_calibrated]
    fits: dict[nn.Module, RangeFit] = {quantizer: RangeFit(quantizer) for quantizer in calibrated}
    affine = {quantizer: fit for quantizer, fit in fits.items() if fit.affine}
    with _unrounded(model):
        if affine:
            _show(model, passes, {quantizer: fit.look for quantizer, fit in affine.items()})
            agree([fit.ends for fit in affine.values()], Reduction.MAXIMUM)
            agree([fit.totals for fit in affine.values()], Reduction.MEAN)
        _show(model, passes, {quantizer: fit.see for quantizer, fit in fits.items()})
    agree([sums for fit in fits.values() for sums in (fit.present, fit.errors)], Reduction.MEAN)
    return fits


def _show(model: nn.Module, passes: Passes, watching: Mapping[nn.Module, Callable[[Tensor], None]]) -> None:
    """Run the model on the passes while some of its quantizers are watched at what they are given."""
    with ExitStack() as hooks:
        for quantizer, watch in watching.items():
            hooks.enter_context(quantizer.register_forward_pre_hook(_given_to(watch)))
        run_again(model, passes)


def _given_to(watch: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _, args: watch(args[0])


@contextmanager
def _unrounded(model: nn.Module) -> Iterator[None]:
    """Let every quantizer of learning adapters hand on what it is given."""
    # Not the weights by a hook: a layer keeps its rounded one for the next pass.
    layers = [(layer, name) for layer, name, _ in learning_adapters(model) if isinstance(layer, BayesianLoraLinear)]
    with awaiting_codes(layers), ExitStack() as hooks:
        for quantizer in _quantizers(model):
            hooks.enter_context(quantizer.register_forward_hook(lambda _, args, __: args[0]))
        yield


@torch.no_grad()
def expect_fitted_ranges(model: nn.Module, fits: Fits) -> None:
    """Scale the evidence of each gate by the share of its error that ranges leave once they are fitted.

    The evidence of a gate is a mean square, like the error of the width that is left when it closes. Weights, whose
    ranges are fitted in any case, are treated alike, so that they and activations remain in one unit.
    """
    for layer, name, gates in learning_adapters(model):
        if not bool(gates.evidence.any()):
            continue
        quantizers = layer.quantizers_of(name)
        for evidence, site in zip(gates.evidence, layer.rows_of(name), strict=True):
            fit = fits.get(quantizers[site.value]) if site.value in quantizers else None
            if fit is not None:
                left = fit.errors_left()
            elif site is Site.WEIGHT:
                left = _share(layer.errors_of_fit(name, FITTED_WIDTHS))
            else:
                continue
            # The gate at a position closes to the width at that position.
            evidence[: len(left)] *= left.to(evidence.device)


def _share(errors: Tensor) -> Tensor:
    """[widths] second over first of [widths, 2], 1 where the first is zero."""
    present, fitted = errors.unbind(dim=1)
    return torch.where(present > 0.0, fitted / torch.where(present > 0.0, present, 1.0), 1.0)


def settle_ranges(model: nn.Module, fits: Fits) -> None:
    """Give each activation the range that suits the width it has by the gates of inference."""
    for layer, name, _ in learning_adapters(model):
        for site, quantizer in layer.quantizers_of(name).items():
            fit = fits.get(quantizer)
            decided = None if fit is None else layer.gate_of(name, Site(site))
            if fit is not None and decided is not None:
                gates, row = decided
                fit.settle(int(bits_of_gates(gates.widths_of(row, hard=True))))
