"""The Bayesian-LoRA tuner: what PEFT calls to put adapters into a model, and to take them out."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from rankbits.errors import RankbitsWarning
from rankbits.tuners.bayesian_lora.config import BayesianLoraConfig, Site
from rankbits.tuners.bayesian_lora.find import adapted_layers
from rankbits.tuners.bayesian_lora.layer import ACTIVATION_SITES, BayesianLoraLinear
from rankbits.tuners.bayesian_lora.siblings import sibling_names
from rankbits.tuners.linear import LinearTuner


class BayesianLoraModel(LinearTuner):
    """A model with Bayesian-LoRA adapters in its linear layers; made by `peft.get_peft_model`."""

    prefix = "bayesian_lora_"
    layer_class = BayesianLoraLinear
    tuner_layer_cls = BayesianLoraLinear

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
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)
        layer = getattr(parent, target_name)
        if isinstance(peft_config, BayesianLoraConfig) and isinstance(layer, BayesianLoraLinear):
            _follow_sibling(layer, parent, current_key, adapter_name, peft_config)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """PEFT's, which leaves plain layers; says so if the adapters quantized activations as well."""
        quantized = {
            site.value
            for _, layer in adapted_layers(self.model)
            for name in kwargs.get("adapter_names") or layer.active_adapters
            for site in layer.effective_sites(name)
            if site in ACTIVATION_SITES
        }
        merged: nn.Module = super().merge_and_unload(*args, **kwargs)
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
        # PEFT looks for the name in the last two places of a key; the state of a quantizer lies one level deeper.
        head, container, tail = key.rpartition(".bayesian_lora_quantizers.")
        if container:
            return head + container + tail.removeprefix(f"{adapter_name}.")
        shortened: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return shortened


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
