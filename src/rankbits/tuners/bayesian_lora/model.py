"""The Bayesian-LoRA tuner: what PEFT calls to put adapters into a model, and to take them out."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from rankbits.errors import RankbitsWarning
from rankbits.tuners.bayesian_lora import attention, head, uncompiled
from rankbits.tuners.bayesian_lora.config import ACTIVATION_SITES, BayesianLoraConfig, Site
from rankbits.tuners.bayesian_lora.find import adapted_layers
from rankbits.tuners.bayesian_lora.layer import BayesianLoraLinear
from rankbits.tuners.bayesian_lora.siblings import sibling_names
from rankbits.tuners.linear import LinearTuner


class BayesianLoraModel(LinearTuner):
    """A model with Bayesian-LoRA adapters in its linear layers; made by `peft.get_peft_model`."""

    prefix = "bayesian_lora_"
    layer_class = BayesianLoraLinear
    tuner_layer_cls = BayesianLoraLinear

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's; under torch.compile a model that records ranges or measures gates runs uncompiled for as long.

        Whether it does is asked in each pass, which a graph with `fullgraph=True` cannot: that takes a hardened model.
        """
        learns = any(getattr(self.peft_config[name], "learns", False) for name in self.active_adapters)
        if learns and torch.compiler.is_compiling() and uncompiled.records_or_measures(self.model):
            return uncompiled.run(self.model, *args, **kwargs)
        return super().forward(*args, **kwargs)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = peft_config
        if isinstance(config, BayesianLoraConfig) and config.quantize_attention:
            operand = attention.operand_of(parent, current_key, lambda key: _is_target(peft_config, key))
            config = config if operand is None else config.of_operand(operand)
        super()._create_and_replace(config, adapter_name, target, target_name, parent, current_key, parameter_name)
        layer = getattr(parent, target_name)
        if isinstance(peft_config, BayesianLoraConfig) and isinstance(layer, BayesianLoraLinear):
            _follow_sibling(layer, parent, current_key, adapter_name, peft_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        # Before anything is changed, and after the targets are known.
        if isinstance(peft_config, BayesianLoraConfig) and peft_config.quantize_attention:
            attention.check_attention(model, lambda key: _is_target(peft_config, key))
        if isinstance(peft_config, BayesianLoraConfig) and peft_config.quantize_head:
            head.check_heads(model, peft_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's; attentions with quantizers are dispatched to them from then on, and heads have theirs."""
        config = self.peft_config[adapter_name]
        heads = config if isinstance(config, BayesianLoraConfig) and config.quantize_head else None
        if heads is not None:
            head.name_late_heads(heads)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        attention.install(model)
        if heads is not None:
            # PEFT has copied the modules that it trains in full by now, and no state has been loaded yet.
            head.install(model, adapter_name, heads)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's; what a phase holds still in a head stays still."""
        super().set_adapter(*args, **kwargs)
        head.apply_phases(self.model)

    def enable_adapter_layers(self) -> None:
        """PEFT's; attentions with quantizers use them again, and what a phase holds still in a head stays still."""
        super().enable_adapter_layers()
        attention.install(self.model)
        head.apply_phases(self.model)

    def disable_adapter_layers(self) -> None:
        """PEFT's; attentions run what they ran before there were quantizers."""
        super().disable_adapter_layers()
        attention.restore(attention.implementations_before(self.model))

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's; without quantizers attentions run what they ran before."""
        super().delete_adapter(adapter_name)
        if not any(any(layer.operands.values()) for _, layer in adapted_layers(self.model)):
            attention.restore(attention.implementations_before(self.model))

    def unload(self) -> nn.Module:
        """PEFT's; attentions run what they ran before there were quantizers, and trained heads have none."""
        before = attention.implementations_before(self.model)
        bare: nn.Module = super().unload()
        attention.restore(before)
        head.replace_by_plain(bare, rounded=False)
        return bare

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """PEFT's, which leaves plain layers; says so if the adapters quantized activations as well."""
        quantized = {
            site.value
            for _, layer in adapted_layers(self.model)
            for name in kwargs.get("adapter_names") or layer.active_adapters
            for site in layer.effective_sites(name)
            if site in ACTIVATION_SITES
        }
        quantized |= {Site.INPUT.value for _, layer in head.quantized_heads(self.model) if layer.active_adapters}
        before = attention.implementations_before(self.model)
        merged: nn.Module = super().merge_and_unload(*args, **kwargs)
        attention.restore(before)
        head.replace_by_plain(merged, rounded=True)
        if quantized:
            warnings.warn(
                f"the weights of the unloaded model lie on their grids, but its activations {sorted(quantized)} are "
                "floats again: their quantizers left with the adapter. merge_adapter() keeps them",
                RankbitsWarning,
                stacklevel=3,
            )
        return merged

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Any]:
        if isinstance(config, BayesianLoraConfig) and config.learns and not was_scheduled(model, adapter_name):
            warnings.warn(
                f"adapter {adapter_name!r} is saved, but its gate schedule was never stepped: ranks and bits are at "
                "their start. Add RankbitsCallback() to the Trainer's callbacks, or step a GateSchedule",
                RankbitsWarning,
                stacklevel=3,
            )
        entries: dict[str, Any] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return entries

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT looks for the name in the last two places of a key; the state of a quantizer lies one level deeper, and
        # that of a head lies in a copy of the adapter's own, without its name.
        if any(f".{part}." in key for part in head.STATE):
            return key
        path, container, tail = key.rpartition(".bayesian_lora_quantizers.")
        if container:
            return path + container + tail.removeprefix(f"{adapter_name}.")
        shortened: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return shortened


def _is_target(config: PeftConfig, key: str) -> bool:
    """Whether a linear layer of this name is adapted."""
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        # PEFT writes the names of all linear layers here, but only after it has asked whether the model suits.
        config = copy.copy(config)
        config.target_modules = {key}  # type: ignore[attr-defined]
    return bool(check_target_module_exists(config, key))


def _follow_sibling(
    layer: BayesianLoraLinear, parent: nn.Module, key: str, adapter_name: str, config: BayesianLoraConfig
) -> None:
    """Let a layer use what the first adapted layer that reads the same tensor owns; layers come in module order."""
    siblings = (getattr(parent, name) for name in sibling_names(parent, key))
    owner = next(
        (s for s in siblings if isinstance(s, BayesianLoraLinear) and adapter_name in s.bayesian_lora_down), layer
    )
    if owner is layer:
        return
    sites = owner.sites_of(adapter_name)
    if config.share_inputs and Site.INPUT in sites:
        layer.follow(adapter_name, owner, Site.INPUT)
    if config.tie_groups is not None and Site.WEIGHT in sites:
        layer.follow(adapter_name, owner, Site.WEIGHT)


def was_scheduled(model: nn.Module, adapter_name: str) -> bool:
    """Whether the gate schedule of an adapter was ever stepped, in this process or before it was loaded."""
    counters = [
        layer.bayesian_lora_steps[adapter_name]
        for _, layer in adapted_layers(model)
        if adapter_name in layer.bayesian_lora_steps
    ]
    return any(not steps.is_meta and int(steps) > 0 for steps in counters)
