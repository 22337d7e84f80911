"""Hardening: learned gates become fixed ranks and fixed bit widths, and the parameters that encoded them go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rankbits.errors import HardenError
from rankbits.quant.fixed_quantizer import FixedQuantizer
from rankbits.quant.quantizer import Quantizer
from rankbits.tuners.bayesian_lora.config import BayesianLoraConfig, Site
from rankbits.tuners.bayesian_lora.find import GatedLayer, adapted_layers, layers_of
from rankbits.tuners.bayesian_lora.head import QuantizedHeadLinear, base_key
from rankbits.tuners.bayesian_lora.layer import BayesianLoraLinear
from rankbits.tuners.bayesian_lora.model import was_scheduled
from rankbits.tuners.bayesian_lora.summary import summarize


def harden(model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Fix the ranks and bit widths that the gates of inference stand for, in place.

    A, E and B are cut to the learned rank (closed ranks contribute exactly zero), every quantizer keeps its range and
    one width, and the gates are dropped. Outputs equal those of evaluation before, up to the order in which the
    smaller products are summed. The adapter's configuration remembers ranks and widths, so that `save_pretrained` and
    `from_pretrained` work as before.

    Args:
        model: a PEFT model, or a model with injected Bayesian-LoRA adapters.
        adapter_name: which adapter; others stay as they are.

    Returns:
        The same model. Hardening a hardened adapter changes nothing.

    Raises:
        HardenError: the model has no such adapter, it is merged, its schedule was never stepped, or a quantizer was
            never calibrated. The model is unchanged.
    """
    layers = list(layers_of(model, adapter_name))
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not layers or not isinstance(config, BayesianLoraConfig):
        found = sorted({name for _, layer in adapted_layers(model) for name in layer.bayesian_lora_down})
        raise HardenError(f"the model has no Bayesian-LoRA adapter {adapter_name!r}; it has {found or 'none'}")
    if config.hardened:
        return model
    _check(model, config, adapter_name, layers)

    prefix = _tuner_prefix(model)
    ranks: dict[str, int] = {}
    bits: dict[str, dict[str, int]] = {}
    unsigned: list[str] = []
    for (name, layer), summary in zip(layers, summarize(model, adapter_name), strict=True):
        key = base_key(name.removeprefix(prefix), adapter_name)
        bits[key] = summary.bits
        quantizers = layer.quantizers_of(adapter_name)
        fixed = {s: _fix(q, summary.bits[s]) for s, q in quantizers.items() if isinstance(q, Quantizer)}
        if isinstance(layer, QuantizedHeadLinear):
            layer.replace_quantizers(fixed)
        else:
            ranks[key] = summary.rank
            _harden_layer(layer, adapter_name, summary.rank, fixed)
        if Site.INPUT.value in fixed and not fixed[Site.INPUT.value].is_signed:
            unsigned.append(key)
    configs: Any = model.peft_config
    configs[adapter_name] = replace(config, hardened_ranks=ranks, hardened_bits=bits, unsigned_inputs=unsigned or None)
    return model


def _check(
    model: nn.Module, config: BayesianLoraConfig, adapter_name: str, layers: list[tuple[str, GatedLayer]]
) -> None:
    if config.learns and not was_scheduled(model, adapter_name):
        raise HardenError(
            f"adapter {adapter_name!r} has learned nothing about ranks and bits: its gate schedule was never stepped. "
            "Train with RankbitsCallback(), or step a GateSchedule, before hardening"
        )
    for name, layer in layers:
        if isinstance(layer, BayesianLoraLinear) and adapter_name in layer.merged_adapters:
            raise HardenError(f"adapter {adapter_name!r} is merged into {name!r}: unmerge it before hardening")
        unseen = layer.sites_without_values(adapter_name)
        if unseen:
            raise HardenError(
                f"the quantizers {unseen} of {name!r} have no range: they saw no training pass with values other than "
                "zero. Train for more steps, or leave the layer out with exclude_modules"
            )
    for _, layer in layers:
        layer.finish_calibration(adapter_name)


def _tuner_prefix(model: nn.Module) -> str:
    """What a PEFT model puts before the names its tuner saw; nothing where the adapters were injected."""
    return "base_model.model." if hasattr(model, "base_model") and hasattr(model, "get_base_model") else ""


@torch.no_grad()
def _harden_layer(layer: BayesianLoraLinear, adapter_name: str, rank: int, fixed: dict[str, FixedQuantizer]) -> None:
    """Cut A, E and B to a rank, and let fixed quantizers take the place of gates."""
    trainable = layer.bayesian_lora_down[adapter_name].requires_grad
    for container, index in (
        (layer.bayesian_lora_down, (slice(rank),)),
        (layer.bayesian_lora_diagonal, (slice(rank),)),
        (layer.bayesian_lora_up, (slice(None), slice(rank))),
    ):
        kept = container[adapter_name].detach()[index].clone()
        container[adapter_name] = nn.Parameter(kept, requires_grad=trainable)
    layer.bayesian_lora_quantizers[adapter_name] = nn.ModuleDict(fixed)
    if adapter_name in layer.bayesian_lora_gates:
        del layer.bayesian_lora_gates[adapter_name]
    layer.frozen_peft_weight_names.pop(adapter_name, None)
    layer.learns_unrounded[adapter_name] = layer.learns_weight_ranges[adapter_name] = False


def _fix(quantizer: Quantizer, width: int) -> FixedQuantizer:
    fixed = FixedQuantizer(
        width,
        signed=quantizer.is_signed,
        layout=quantizer.layout,
        shape=quantizer.shape,
        full=quantizer.full,
        affine=quantizer.low_ is not None,
    )
    fixed.fixed_range = quantizer.range_at(width).detach().clone()
    fixed.lows = None if quantizer.low_ is None else quantizer.low_.detach().clone()
    fixed.offsets = None if quantizer.offsets is None else quantizer.offsets.clone()
    return fixed
