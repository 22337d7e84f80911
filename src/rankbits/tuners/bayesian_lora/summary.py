"""What each adapted layer has learned: ranks and bit widths, as delivered and as expected under the gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rankbits.quant.grid import bits_of_gates, expected_bits
from rankbits.quant.quantizer import FixedQuantizer
from rankbits.tuners.bayesian_lora.find import adapted_layers
from rankbits.tuners.bayesian_lora.layer import BayesianLoraLinear
from rankbits.tuners.bayesian_lora.layer_gates import LayerGates


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer.

    Args:
        name: qualified name of the layer in the model that was asked.
        rank: rank with the gates of inference.
        max_rank: rank the adapter started with.
        expected_rank: mean rank under the gate probabilities; None where ranks have no gates (not learned, hardened).
        bits: site to bit width with the gates of inference.
        expected_bits: site to mean bit width under the gate probabilities.
    """

    name: str
    rank: int
    max_rank: int
    expected_rank: float | None
    bits: dict[str, int]
    expected_bits: dict[str, float]


@torch.no_grad()
def summarize(model: nn.Module, adapter_name: str = "default") -> list[LayerSummary]:
    """Ranks and bit widths of every layer that has the adapter, whatever mode the model is in.

    Args:
        model: a PEFT model, or a model with injected adapters, hardened or not.
        adapter_name: which adapter.

    Returns:
        One entry per layer in module order; empty if no layer has the adapter.
    """
    return [
        _layer_summary(name, layer, adapter_name)
        for name, layer in adapted_layers(model)
        if adapter_name in layer.bayesian_lora_down
    ]


def _layer_summary(name: str, layer: BayesianLoraLinear, adapter_name: str) -> LayerSummary:
    gates = layer.gates_of(adapter_name)
    if gates is not None:
        return _gated_summary(name, layer, adapter_name, gates)
    bits = {
        site: module.bits
        for site, module in layer.quantizers_of(adapter_name).items()
        if isinstance(module, FixedQuantizer)
    }
    rank = layer.bayesian_lora_down[adapter_name].shape[0]
    return LayerSummary(name, rank, layer.r[adapter_name], None, bits, {k: float(v) for k, v in bits.items()})


def _gated_summary(name: str, layer: BayesianLoraLinear, adapter_name: str, gates: LayerGates) -> LayerSummary:
    values = gates.values(hard=True)
    maximum = layer.r[adapter_name]
    probabilities = gates.rank_probabilities()
    expected_rank = None if probabilities is None else 1.0 + float(probabilities.sum())
    rank = maximum if values.ranks is None else int(values.ranks.sum())
    bits: dict[str, int] = {}
    expected: dict[str, float] = {}
    widths = gates.width_probabilities()
    if widths is not None:
        sites = [site.value for site in layer.sites_of(adapter_name)]
        bits = dict(zip(sites, bits_of_gates(values.widths).tolist(), strict=True))
        expected = dict(zip(sites, expected_bits(widths).tolist(), strict=True))
    return LayerSummary(name, rank, maximum, expected_rank, bits, expected)
