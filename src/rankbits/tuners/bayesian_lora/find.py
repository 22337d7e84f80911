"""Finding the Bayesian-LoRA layers of a model, afresh at each use: nothing keeps a reference to a parameter."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rankbits.tuners.bayesian_lora.layer import BayesianLoraLinear
from rankbits.tuners.bayesian_lora.layer_gates import LayerGates


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, BayesianLoraLinear]]:
    """All Bayesian-LoRA layers of a model with their qualified names, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, BayesianLoraLinear):
            yield name, module


def learning_adapters(model: nn.Module) -> Iterator[tuple[BayesianLoraLinear, str, LayerGates]]:
    """Every (layer, adapter, gates) of a model whose adapter is active and has gates."""
    for _, layer in adapted_layers(model):
        for name in layer.active_adapters:
            gates = layer.gates_of(name)
            if gates is not None:
                yield layer, name, gates
