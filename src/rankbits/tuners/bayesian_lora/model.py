"""The Bayesian-LoRA tuner: what PEFT calls to put adapters into a model, and to take them out."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from rankbits.errors import RankbitsWarning
from rankbits.tuners.bayesian_lora.config import BayesianLoraConfig
from rankbits.tuners.bayesian_lora.find import adapted_layers
from rankbits.tuners.bayesian_lora.layer import BayesianLoraLinear
from rankbits.tuners.linear import LinearTuner


class BayesianLoraModel(LinearTuner):
    """A model with Bayesian-LoRA adapters in its linear layers; made by `peft.get_peft_model`."""

    prefix = "bayesian_lora_"
    layer_class = BayesianLoraLinear
    tuner_layer_cls = BayesianLoraLinear

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


def was_scheduled(model: nn.Module, adapter_name: str) -> bool:
    """Whether the gate schedule of an adapter was ever stepped, in this process or before it was loaded."""
    counters = [
        layer.bayesian_lora_steps[adapter_name]
        for _, layer in adapted_layers(model)
        if adapter_name in layer.bayesian_lora_steps
    ]
    return any(not steps.is_meta and int(steps) > 0 for steps in counters)
