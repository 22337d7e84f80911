"""Passes that torch.compile leaves alone: those that record ranges, or measure gates.

What they do on the way, layer by layer, would cut the graph into a piece for every layer, and those are no longer put
together once passes record and measure nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rankbits.quant.quantizer import Quantizer
from rankbits.tuners.bayesian_lora.layer_gates import LayerGates


def _records_or_measures(model: nn.Module) -> bool:
    for module in model.modules():
        if isinstance(module, Quantizer) and not module.knows_its_range:
            return True
        if isinstance(module, LayerGates) and module.measures:
            return True
    return False


def _run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


records_or_measures: Any = torch.compiler.disable(_records_or_measures)
"""Whether the next pass of a model does either. Asked outside of the graph, which would check each layer for it."""

run: Any = torch.compiler.disable(_run)
"""Run a model as it is; the kernels of its quantizers are compiled all the same."""
