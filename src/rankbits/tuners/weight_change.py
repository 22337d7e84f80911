"""How far fine-tuning moved weights, in magnitude and in direction (Liu et al. 2024, DoRA, Sec. 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankbits.errors import ModelError

PEFT_PREFIX = "base_model.model."


class WeightChange(NamedTuple):
    """Change of one weight matrix.

    Args:
        magnitude: mean absolute change of the norms of its rows.
        direction: mean of one less the cosine between a row before and after, from 0 to 2.
    """

    magnitude: float
    direction: float


def weight_change(before: Tensor, after: Tensor) -> WeightChange:
    """Change of a matrix in magnitude and direction, a vector being all weights of one output (DoRA, Eqs. 3 and 4).

    A row that is zero before or after has no direction and leaves the mean of directions.

    Args:
        before: [out_features, in_features].
        after: of the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"before has the shape {list(before.shape)}, after has {list(after.shape)}; expected the same")
    first, last = before.detach().double(), after.detach().double()
    norms, moved = first.norm(dim=1), last.norm(dim=1)  # [out_features] each
    directed = (norms > 0.0) & (moved > 0.0)
    cosines = (first * last).sum(dim=1)[directed] / (norms * moved)[directed]
    direction = float((1.0 - cosines).mean()) if len(cosines) else 0.0
    return WeightChange(float((moved - norms).abs().mean()), direction)


def merged_weights(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The weights that a model's linear layers would have with their active adapters merged.

    Args:
        model: with adapters of PEFT or of rankbits, or without any; afterwards it is bit for bit what it was.
        wanted: whether a layer is asked for, by its name in the model without adapters.

    Returns:
        [out_features, in_features] of each wanted layer, by that name.

    Raises:
        MergeError: an adapter of ours that cannot be merged.
        ModelError: a wanted layer holds its weight as codes of 4 or 8 bits.
    """
    return {name: _merged(name, layer) for name, layer in _linear_layers(model) if wanted(name)}


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{name}."
        elif not isinstance(module, (nn.Linear, Conv1D)):
            continue
        yield name.removeprefix(PEFT_PREFIX), module


def _merged(name: str, layer: nn.Module) -> Tensor:
    adapted: Any = layer if isinstance(layer, BaseTunerLayer) else None
    base: Any = layer if adapted is None else adapted.get_base_layer()
    if not base.weight.is_floating_point():
        raise ModelError(f"layer {name} holds its weight as codes ({base.weight.dtype}), expected floating point")
    merged = kept = base.weight.detach().clone()
    if adapted is not None:
        adapted.merge()
        merged = base.weight.detach().clone()
        adapted.unmerge()
        with torch.no_grad():
            # PEFT subtracts what it added, which is not exact.
            base.weight.copy_(kept)
    oriented: Tensor = merged.T if isinstance(base, Conv1D) else merged
    return oriented
