"""A plain LoRA adapter, as PEFT alone loads it: exact factors, and whatever was trained in full beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from rankbits.errors import ExportError
from rankbits.export.active import tuner_layers
from rankbits.tuners.bayesian_lora import BayesianLoraLinear
from rankbits.tuners.dylora import DyloraLinear
from rankbits.tuners.linear import AdapterLinear
from rankbits.tuners.mora import MoraLinear
from rankbits.tuners.sbora import SboraLinear

WRAPPER = "base_model.model."
"""What PEFT puts before the names of a base model's modules in a saved adapter."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The update of one layer, scale * up @ down.

    Args:
        down: A, [r, in_features].
        up: B, [out_features, r].
        scale: what LoRA writes as alpha / r.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """How many rows A has."""
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        """The lora_alpha that gives the scale at this rank: a whole number, written as one, where it is one."""
        alpha = self.scale * self.rank
        return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def prepare(model: PeftModel, adapter_name: str) -> Callable[[Path], None]:
    """Make sure that an adapter can leave as plain LoRA.

    Args:
        model: a PEFT model.
        adapter_name: its one active adapter.

    Returns:
        What writes adapter_config.json and adapter_model.safetensors into an empty folder.

    Raises:
        ExportError: the update has no pair of factors, or they are not finite.
    """
    given = model.peft_config[adapter_name]
    if getattr(given, "use_dora", False):
        raise ExportError(
            f"adapter {adapter_name!r} is DoRA, whose magnitudes have no place in plain LoRA. Try to='merged', or keep "
            "it as it is with save_pretrained: PEFT loads it"
        )
    if given.peft_type == PeftType.LORA:
        return lambda folder: _pass_through(model, adapter_name, folder)
    factors = _all_factors(model, adapter_name)
    adapted = {name: pair for name, pair in factors.items() if pair.rank}
    if not adapted:
        raise ExportError(f"all layers of adapter {adapter_name!r} have rank 0: what is left of it is the base model")
    tensors = _trained_in_full(model, adapter_name, factors)
    for name, pair in adapted.items():
        tensors[f"{WRAPPER}{name}.lora_A.weight"] = pair.down.contiguous()
        tensors[f"{WRAPPER}{name}.lora_B.weight"] = pair.up.contiguous()
    config = _config(model, given, adapted)

    def write(folder: Path) -> None:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(folder))

    return write


def _pass_through(model: PeftModel, adapter_name: str, folder: Path) -> None:
    model.save_pretrained(str(folder), selected_adapters=[adapter_name])
    # PEFT gives every adapter a folder of its own, unless it goes by its default name.
    own = folder / adapter_name
    if adapter_name != "default" and own.is_dir():
        for file in own.iterdir():
            file.replace(folder / file.name)
        own.rmdir()


def _all_factors(model: PeftModel, adapter_name: str) -> dict[str, Factors]:
    """The factors of every layer that has the adapter, by its name in the base model."""
    found = {}
    for name, layer in tuner_layers(model):
        if adapter_name not in layer._get_available_adapters():
            continue
        try:
            factors = _factors(layer, adapter_name)
        except ValueError as reason:
            raise ExportError(f"{name!r} has no exact plain LoRA: {reason}. Try to='merged'") from reason
        if not all(bool(torch.isfinite(factor).all()) for factor in (factors.down, factors.up)):
            raise ExportError(f"the update of {name!r} has values that are NaN or infinite")
        found[name] = factors
    return found


def _factors(layer: BaseTunerLayer, adapter_name: str) -> Factors:
    match layer:
        case DyloraLinear() | BayesianLoraLinear():
            return Factors(*layer.lora_factors(adapter_name))
        case SboraLinear():
            return Factors(*layer.lora_factors(adapter_name), layer.scaling[adapter_name])
        case MoraLinear():
            return Factors(*layer.lora_factors(adapter_name), 1.0)
    raise ExportError(
        f"the adapters of a {type(layer).__name__} are not exported as plain LoRA; expected those "
        "of DyLoRA, SBoRA, MoRA without blocks, Bayesian-LoRA without quantizers, or LoRA itself"
    )


def _trained_in_full(model: PeftModel, adapter_name: str, layers: Collection[str]) -> dict[str, Tensor]:
    """What PEFT saves with an adapter besides the tensors of its layers: heads, and embeddings of a new size."""
    own = tuple(f"{WRAPPER}{name}." for name in layers)
    saved: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {key: tensor.detach().clone().contiguous() for key, tensor in saved.items() if not key.startswith(own)}


def _config(model: PeftModel, source: PeftConfig, factors: dict[str, Factors]) -> LoraConfig:
    """The configuration with the largest rank, and the others as patterns.

    Layers with one scale, such as those of hardened adapters, then have it as lora_alpha / r of the configuration, too,
    so that loaders that know of ranks only what the tensors show still scale rightly.
    """
    largest = max(factors.values(), key=lambda pair: pair.rank)
    base = model.get_base_model()
    modules = dict(base.named_modules())
    layers = [modules[name] for name in factors]
    saved = getattr(source, "modules_to_save", None)
    settings: dict[str, Any] = {
        "r": largest.rank,
        "lora_alpha": largest.alpha,
        "rank_pattern": {_pattern(n): pair.rank for n, pair in factors.items() if pair.rank != largest.rank},
        "alpha_pattern": {_pattern(n): pair.alpha for n, pair in factors.items() if pair.alpha != largest.alpha},
        "lora_dropout": getattr(source, "dropout", 0.0),
        "fan_in_fan_out": any(isinstance(layer, AdapterLinear) and layer.is_transposed for layer in layers),
        "modules_to_save": list(dict.fromkeys(saved)) if saved else None,
        "task_type": source.task_type,
        "base_model_name_or_path": source.base_model_name_or_path or vars(base).get("name_or_path"),
        "revision": source.revision,
        "inference_mode": True,
    }
    if source.task_type is None:
        settings["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    config = LoraConfig(**settings)
    # LoraConfig makes a set of a list that it is given, and its file would name the layers in another order each time.
    config.target_modules = _targets(factors, modules)
    return config


def _pattern(name: str) -> str:
    """A key of rank_pattern or alpha_pattern that means this one module: PEFT reads keys as regular expressions."""
    return f"^{re.escape(name)}"


def _targets(names: Collection[str], modules: Collection[str]) -> list[str] | str:
    """What makes PEFT adapt exactly these modules: their names, or an expression where other names end like one."""
    also = [m for m in modules if m not in names and any(m.endswith(f".{name}") for name in names)]
    return "|".join(re.escape(name) for name in names) if also else sorted(names)
