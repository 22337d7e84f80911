"""The rank at which a DyLoRA adapter is evaluated, merged and exported: chosen after training, saved with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from rankbits.tuners.dylora.config import DyloraConfig
from rankbits.tuners.dylora.layer import DyloraLinear, check_rank


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, DyloraLinear]]:
    """All DyLoRA layers of a model with their qualified names, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, DyloraLinear):
            yield name, module


def set_rank(model: nn.Module, rank: int, adapter_name: str = "default") -> None:
    """Use an adapter at one of its ranks, in all layers, until told otherwise (Valipour et al. 2022).

    Nothing is trained or lost: a larger rank can be set again. `save_pretrained` stores the rank, merging and export
    use it, and training leaves it alone.

    Args:
        model: a PEFT model, or a model with injected DyLoRA adapters.
        rank: b in 1..r.
        adapter_name: which adapter.

    Raises:
        ValueError: the model has no such DyLoRA adapter, the rank is not in 1..r, or the adapter is merged at another
            rank. The model is unchanged.
    """
    layers = [(name, layer) for name, layer in adapted_layers(model) if adapter_name in layer.r]
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not layers or not isinstance(config, DyloraConfig):
        found = sorted({name for _, layer in adapted_layers(model) for name in layer.r})
        raise ValueError(f"the model has no DyLoRA adapter {adapter_name!r}; it has {found or 'none'}")
    check_rank(rank, config.r, adapter_name)
    for name, layer in layers:
        if adapter_name in layer.merged_adapters and rank != layer.evaluation_rank[adapter_name]:
            raise ValueError(
                f"adapter {adapter_name!r} is merged into {name!r} at rank {layer.evaluation_rank[adapter_name]}: "
                f"unmerge it before setting rank {rank}"
            )
    for _, layer in layers:
        layer.evaluation_rank[adapter_name] = rank
    configs[adapter_name] = replace(config, evaluation_rank=rank)
