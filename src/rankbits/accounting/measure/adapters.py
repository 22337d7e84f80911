"""What adapters a model carries: which are active, whether they merge exactly, and what they have learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from rankbits.accounting.measure.quantized import opaque_weight_bits
from rankbits.errors import MergeError, ModelError
from rankbits.tuners.bayesian_lora import (
    BayesianLoraLinear,
    GatedLayer,
    LayerSummary,
    QuantizedHeadLinear,
    adapted_layers,
    gated_layers,
    summarize,
)
from rankbits.tuners.bayesian_lora.config import Placement, Site
from rankbits.tuners.bayesian_lora.reuse import Rounded
from rankbits.tuners.linear import AdapterLinear

_OPERANDS = {
    "lora_A": "A",
    "lora_embedding_A": "A",
    "bayesian_lora_down": "A",
    "dylora_down": "A",
    "lora_B": "B",
    "lora_embedding_B": "B",
    "bayesian_lora_up": "B",
    "dylora_up": "B",
    "sbora_down": "A",
    "sbora_up": "B",
    "lora_E": "E",
    "bayesian_lora_diagonal": "E",
    "lora_magnitude_vector": "magnitude",
    "bottleneck_down": "D",
    "bottleneck_up": "U",
    "mora_M": "M",
}
"""Containers of adapter parameters by the name of the operand."""


@dataclass(frozen=True)
class Learned:
    """Hard widths and ranks of the active adapters of a model.

    Args:
        bits: width of each quantizer module, by its identity.
        ranks: rank of an adapter by (layer, adapter), where its layer multiplies more rows than it keeps.
        layers: (layer, adapter) to what Bayesian-LoRA learned there.
        heads: (layer, adapter) to what it learned in linear layers of heads that are trained in full.
        weights: width of base weights that hold a rounded sum of weight and update, by their identity.
    """

    bits: dict[int, int] = field(default_factory=dict)
    ranks: dict[tuple[str, str], int] = field(default_factory=dict)
    layers: dict[tuple[str, str], LayerSummary] = field(default_factory=dict)
    heads: dict[tuple[str, str], LayerSummary] = field(default_factory=dict)
    weights: dict[int, int] = field(default_factory=dict)


def bare(model: Any) -> nn.Module:
    """The module to run: without what torch.compile, data parallelism and PEFT put around it.

    A model with virtual tokens stays in PEFT's wrapper, which adds them.

    Raises:
        ModelError: it is no torch module, or PEFT's with a method that neither wraps layers nor adds virtual tokens.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: given a {type(model).__name__}, expected a torch.nn.Module")
    module: nn.Module = model
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            module = inner
        elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(module, PeftModel) and not has_virtual_tokens(module):
            _check_layers(module)
            module = module.get_base_model()
        else:
            return module


def _check_layers(model: PeftModel) -> None:
    """Refuse adapters that would run unseen: those that are no layers, unless they are switched off."""
    if any(isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper) for part in model.modules()):
        return
    if getattr(model.base_model, "_enabled", True):
        kind = getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type)
        raise ModelError(
            f"model: given a {type(model).__name__} with an adapter of type {kind}, which cannot be counted; expected "
            "adapters that wrap layers, such as LORA, or that add virtual tokens"
        )


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether the model is PEFT's, with a prompt or prefix."""
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def base_of(root: nn.Module) -> nn.Module:
    """The base model below virtual tokens; the model itself where there are none."""
    return bare(root.get_base_model()) if isinstance(root, PeftModel) else root


def tuner_layers(root: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """All layers with adapters, with their names."""
    for name, module in root.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def active_adapters(layer: BaseTunerLayer) -> list[str]:
    """The adapters that run in a layer beside its base: none if they are disabled or merged."""
    if layer.disable_adapters or getattr(layer, "merged", False):
        return []
    available = layer._get_available_adapters()
    return [name for name in layer.active_adapters if name in available]


def acting_adapters(layer: BaseTunerLayer) -> list[str]:
    """The adapters that run in a layer, and a merged one whose quantizers still do their work around the weight."""
    if isinstance(layer, BayesianLoraLinear) and layer.merged:
        return [name for name in layer.merged_adapters if rounds_sum(layer, name)]
    return active_adapters(layer)


def rounds_sum(layer: BaseTunerLayer, adapter: str) -> bool:
    """Whether one quantizer rounds the sum of weight and update, so that the merged weight lies on its grid."""
    return (
        isinstance(layer, BayesianLoraLinear)
        and layer.placement_of(adapter) is Placement.MERGED
        and Site.WEIGHT in layer.effective_sites(adapter)
    )


def treat_as_merged(root: nn.Module) -> None:
    """Let layers that round their sum run as they do once merged. No weight is written: only widths are of interest.

    To be called where the attributes of modules are put back afterwards.
    """
    for _, layer in adapted_layers(root):
        layer.merged_adapters = list(layer.merged_adapters) or [
            n for n in active_adapters(layer) if rounds_sum(layer, n)
        ]


def forget_results(root: nn.Module) -> None:
    """Drop weights that were rounded in an earlier pass: what is not made anew is not seen.

    To be called where the attributes of modules are put back afterwards.
    """
    for _, layer in adapted_layers(root):
        layer.rounded_weights = {name: Rounded() for name in layer.rounded_weights}


def has_adapters(root: nn.Module) -> bool:
    """Whether anything runs beside the base model."""
    return has_virtual_tokens(root) or any(active_adapters(layer) for _, layer in tuner_layers(root))


def run_adapters(root: nn.Module, *, enabled: bool) -> None:
    """Switch the adapters off for good, or leave on those that are on; merged weights stay as they are.

    To be called where the attributes of modules are put back afterwards. PEFT would unmerge a merged layer that is
    switched off, so such a layer is left on: it runs its base alone.
    """
    for _, layer in tuner_layers(root):
        merged = bool(getattr(layer, "merged", False))
        layer._disable_adapters = not merged and (layer.disable_adapters or not enabled)


def why_unmergeable(root: nn.Module, *, exact: bool) -> str | None:
    """Why some active adapter cannot become part of its layer's weight; None if all can.

    Args:
        root: the model.
        exact: whether the merged weight has to compute at no more bits than the layer does now; an adapter that
            quantizes its weights leaves the grid when it is merged.
    """
    if has_virtual_tokens(root):
        return "it adds virtual tokens, which no weight can hold"
    for name, layer in tuner_layers(root):
        active = active_adapters(layer)
        reason = _why_layer(layer, active, exact=exact) if active else None
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _why_layer(layer: BaseTunerLayer, active: list[str], *, exact: bool) -> str | None:
    if isinstance(layer, AdapterLinear):
        try:
            layer.check_mergeable(active)
        except MergeError as error:
            return str(error)
        quantizing = isinstance(layer, BayesianLoraLinear) and any(layer.effective_sites(name) for name in active)
        if quantizing and exact and not all(rounds_sum(layer, name) for name in active):
            return "its weights are quantized, and the merged weight lies on none of their grids"
    if type(layer).merge is BaseTunerLayer.merge:
        return f"{type(layer).__name__} has no merged form"
    variants = [type(variant).__name__ for variant in getattr(layer, "lora_variant", {}).values()]
    if any("ALora" in variant for variant in variants):
        return "activated LoRA depends on the tokens, so no weight can hold it"
    if opaque_weight_bits(layer.get_base_layer()) is not None:
        return "its base is stored in few bits, and merging would round the update to them"
    return None


def learned(root: nn.Module) -> Learned:
    """What the acting adapters have learned, with the gates of inference whatever mode the model is in."""
    found = Learned()
    layers = dict(gated_layers(root))
    for adapter in sorted({name for layer in layers.values() for name in _acting(layer)}):
        for entry in summarize(root, adapter):
            layer = layers[entry.name]
            if adapter not in _acting(layer):
                continue
            quantizers = layer.quantizers_of(adapter)
            found.bits.update({id(module): entry.bits.get(site, 32) for site, module in quantizers.items()})
            if isinstance(layer, QuantizedHeadLinear):
                found.heads[entry.name, adapter] = entry
                continue
            found.layers[entry.name, adapter] = entry
            found.ranks[entry.name, adapter] = entry.rank
            if layer.merged:
                found.weights[id(layer.get_base_layer().weight)] = entry.bits[Site.WEIGHT.value]
    found.ranks.update(_pruned_ranks(root))
    return found


def _acting(layer: GatedLayer) -> list[str]:
    """The adapters whose quantizers do their work in a layer."""
    if isinstance(layer, QuantizedHeadLinear):
        return [] if layer.disable_adapters else layer.active_adapters
    return acting_adapters(layer)


def _pruned_ranks(root: nn.Module) -> Iterator[tuple[tuple[str, str], int]]:
    """Ranks that AdaLoRA has kept: PEFT sets the others' singular values to zero and multiplies them all the same."""
    for name, layer in tuner_layers(root):
        for adapter in active_adapters(layer):
            values = getattr(layer, "lora_E", {})
            kept = 0
            if adapter in values and not values[adapter].is_meta:
                kept = int(torch.count_nonzero(values[adapter].detach()))
            # All are zero before the first step, when none has been pruned.
            if kept:
                yield (name, adapter), kept


def operand_of(parameter: str) -> str:
    """Name of an adapter's parameter as an operand, by the container it lies in; the container's own if unknown."""
    parts = parameter.split(".")
    return next((_OPERANDS[part] for part in parts if part in _OPERANDS), parts[0])


def adapter_parameters(root: nn.Module) -> dict[int, tuple[str, str, bool]]:
    """(operand, adapter, whether it runs) of every parameter that belongs to an adapter, by its identity."""
    found: dict[int, tuple[str, str, bool]] = {}
    for _, layer in tuner_layers(root):
        available, active = layer._get_available_adapters(), active_adapters(layer)
        base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
        for name, parameter in layer.named_parameters():  # type: ignore[attr-defined]
            if id(parameter) not in base:
                adapter = next((part for part in name.split(".") if part in available), "default")
                found.setdefault(id(parameter), (operand_of(name), adapter, adapter in active))
    return found
