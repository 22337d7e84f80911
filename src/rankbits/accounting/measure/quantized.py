"""Linear layers whose weight is stored in few bits, by bitsandbytes or torchao, and whose kernel cannot be watched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankbits.records.costs import SCALE_BYTES

_BITSANDBYTES = {"Linear4bit": 4, "Linear8bitLt": 8}
"""Classes of bitsandbytes by the width of their weights."""


def opaque_weight_bits(module: nn.Module) -> int | None:
    """Width of the weight of a linear layer that is to be counted as a whole, None for all other modules."""
    for base in type(module).__mro__:
        if base.__module__.partition(".")[0] == "bitsandbytes" and base.__name__ in _BITSANDBYTES:
            return _BITSANDBYTES[base.__name__]
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    if weight is None or not hasattr(weight, "__tensor_flatten__"):
        return None
    return _flattened_bits(weight)


def _flattened_bits(weight: Any) -> int:
    """Bits per number of a tensor subclass: those of its largest part, the codes, spread over its elements."""
    parts = [part for part in _parts(weight) if isinstance(part, Tensor)]
    largest = max((part.numel() * part.dtype.itemsize for part in parts), default=0)
    bits = 8 * largest / weight.numel()
    return min((width for width in (2, 4, 8, 16) if bits <= width), default=32)


def _parts(tensor: Any) -> list[Any]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def scale_count(module: nn.Module) -> int:
    """How many float32 scales come with such a weight, other bytes beside the codes counted as scales."""
    weight: Any = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if state is not None:
        size = state.absmax.numel() * state.absmax.dtype.itemsize
        second = getattr(state, "state2", None)
        if second is not None:
            size += second.absmax.numel() * second.absmax.dtype.itemsize + SCALE_BYTES
        return int(-(-size // SCALE_BYTES))
    if hasattr(weight, "__tensor_flatten__"):
        sizes = sorted(part.numel() * part.dtype.itemsize for part in _parts(weight) if isinstance(part, Tensor))
        return -(-sum(sizes[:-1]) // SCALE_BYTES)
    # bitsandbytes moves the scales of an 8-bit weight from the weight to the layer's state when it first runs.
    row_scales = next(
        (own for own in (getattr(p, "SCB", None) for p in (weight, getattr(module, "state", None))) if own is not None),
        None,
    )
    return int(row_scales.numel()) if isinstance(row_scales, torch.Tensor) else 0
