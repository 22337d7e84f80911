"""Codes of weights that make up for each other's errors, by what their layers read in given passes.

The passes are run through the model in evaluation and with these weights unrounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankbits.quant.company import has_company
from rankbits.training.passes import Passes, run_again
from rankbits.tuners.bayesian_lora import learning_adapters
from rankbits.tuners.bayesian_lora.layer import BayesianLoraLinear

MOMENT_BYTES = 2**30
"""Layers are looked at together until what is kept of their inputs takes so much."""


def compensated(model: nn.Module) -> Iterator[tuple[BayesianLoraLinear, str]]:
    """Layers, and the names of their adapters, whose weights have codes that are chosen."""
    for layer, name, _ in learning_adapters(model):
        if isinstance(layer, BayesianLoraLinear) and layer.may_compensate(name):
            yield layer, name


@torch.no_grad()
def compensate(model: nn.Module, layers: Sequence[tuple[BayesianLoraLinear, str]], passes: Passes) -> None:
    """Round the weights of layers so that their outputs in these passes move least.

    Until all have their codes they run unrounded, as do those that are rounded later: what comes through nearest codes
    of few bits says little about what a layer is going to read.

    Args:
        model: it is run in evaluation, as often as `MOMENT_BYTES` asks for; its mode stays as it was.
        layers: and the names of their adapters.
        passes: inputs of the model.
    """
    later = [(layer, name) for layer, name in compensated(model) if layer.learns_unrounded[name]]
    with awaiting_codes([*layers, *later]):
        for some in _together(layers):
            moments = _moments(model, some, passes)
            for (layer, name), moment in zip(some, moments, strict=True):
                layer.compensate(name, moment)


@contextmanager
def awaiting_codes(layers: Sequence[tuple[BayesianLoraLinear, str]]) -> Iterator[None]:
    """Run the weights of these layers unrounded."""
    for layer, name in layers:
        layer.awaits_codes[name] = True
    try:
        yield
    finally:
        for layer, name in layers:
            layer.awaits_codes[name] = False


def _moments(model: nn.Module, layers: Sequence[tuple[BayesianLoraLinear, str]], passes: Passes) -> list[Tensor]:
    """Second moment of the inputs of each layer over all passes, and over all processes."""
    moments = [
        torch.zeros(layer.in_features, layer.in_features, device=layer.device_of(name)) for layer, name in layers
    ]
    with ExitStack() as hooks:
        for (layer, name), moment in zip(layers, moments, strict=True):

            def add(module: nn.Module, args: tuple[Any, ...], name: str = name, moment: Tensor = moment) -> None:
                assert isinstance(module, BayesianLoraLinear)
                moment += module.input_moment(name, args[0])

            hooks.enter_context(layer.register_forward_pre_hook(add))
        run_again(model, passes)
    if has_company():
        for moment in moments:
            torch.distributed.all_reduce(moment)
    return moments


def _together(
    layers: Sequence[tuple[BayesianLoraLinear, str]],
) -> Iterator[list[tuple[BayesianLoraLinear, str]]]:
    """Layers in order, cut where the moments of their inputs would take more than `MOMENT_BYTES`."""
    some: list[tuple[BayesianLoraLinear, str]] = []
    taken = 0
    for layer, name in layers:
        needed = 4 * layer.in_features**2
        if some and taken + needed > MOMENT_BYTES:
            yield some
            some, taken = [], 0
        some.append((layer, name))
        taken += needed
    if some:
        yield some
