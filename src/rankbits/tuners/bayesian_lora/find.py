"""Finding the Bayesian-LoRA layers of a model, afresh at each use: nothing keeps a reference to a parameter."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rankbits.tuners.bayesian_lora.head import QuantizedHeadLinear
from rankbits.tuners.bayesian_lora.layer import BayesianLoraLinear
from rankbits.tuners.bayesian_lora.layer_gates import LayerGates

GatedLayer = BayesianLoraLinear | QuantizedHeadLinear
"""What has gates: an adapted layer, or a linear layer of a head that is trained in full."""


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, BayesianLoraLinear]]:
    """All Bayesian-LoRA layers of a model with their qualified names, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, BayesianLoraLinear):
            yield name, module


def gated_layers(model: nn.Module) -> Iterator[tuple[str, GatedLayer]]:
    """All layers that may have gates, adapted ones and quantized heads, with their qualified names in module order."""
    for name, module in model.named_modules():
        if isinstance(module, BayesianLoraLinear | QuantizedHeadLinear):
            yield name, module


def layers_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, GatedLayer]]:
    """All layers that an adapter has, active or not: adapted ones and its quantized heads, in module order."""
    for name, layer in gated_layers(model):
        own = layer.bayesian_lora_down if isinstance(layer, BayesianLoraLinear) else (layer.adapter_name,)
        if adapter_name in own:
            yield name, layer


def learning_adapters(model: nn.Module) -> Iterator[tuple[GatedLayer, str, LayerGates]]:
    """Every (layer, adapter, gates) of a model whose adapter is active and has gates."""
    for _, layer in gated_layers(model):
        for name in layer.active_adapters:
            gates = layer.gates_of(name)
            if gates is not None:
                yield layer, name, gates
