"""Passes that torch.compile leaves alone: while ranges are recorded, or gates measured.

What is done then, layer by layer, would cut the graph into a piece for every layer, and PyTorch keeps the pieces when
there is nothing left to cut them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rankbits.quant.quantizer import Quantizer
from rankbits.tuners.bayesian_lora.find import gated_layers, learning_adapters


def _records_or_measures(model: nn.Module) -> bool:
    if any(gates.measures for _, _, gates in learning_adapters(model)):
        return True
    quantizers = list(_quantizers(model))
    unknown = [quantizer for quantizer in quantizers if not quantizer.knows_its_range]
    # One that no pass has reached while others found their ranges is not waited for: its layer may never run.
    return any(int(quantizer.passes) > 0 for quantizer in unknown) or 0 < len(unknown) == len(quantizers)


def _quantizers(model: nn.Module) -> Iterator[Quantizer]:
    """Those with ranges to be found or learned, of active adapters."""
    for _, layer in gated_layers(model):
        for name in layer.active_adapters:
            yield from (q for q in layer.quantizers_of(name).values() if isinstance(q, Quantizer))


def _run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


records_or_measures: Any = torch.compiler.disable(_records_or_measures)
"""Whether a model is at either now, in training or in evaluation. Asked outside of the graph, which would check each
layer for it."""

run: Any = torch.compiler.disable(_run)
"""Run a model as it is; the kernels of its quantizers are compiled all the same."""
