"""Updates of some rows or columns, written into the weight of a base layer and taken out of it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankbits.tuners.linear import AdapterLinear


@dataclass(frozen=True, eq=False)
class SliceUpdate:
    """What one adapter adds to a weight [out_features, in_features].

    Args:
        dim: 1 for columns, 0 for rows.
        indices: [r], distinct.
        values: [out_features, r] for columns, [r, in_features] for rows.
    """

    dim: int
    indices: Tensor
    values: Tensor

    def slice_of(self, weight: Tensor) -> Tensor:
        """The rows or columns themselves, copied: of the shape of `values`."""
        return weight.index_select(self.dim, self.indices.to(weight.device))

    def sum_with(self, weight: Tensor) -> Tensor:
        """The rows or columns with the update, added in at least float32, in the dtype of the weight."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        values = self.values.to(device=weight.device, dtype=wide)
        return (self.slice_of(weight).to(wide) + values).to(weight.dtype)

    def put(self, weight: Tensor, rows_or_columns: Tensor) -> None:
        """Overwrite the rows or columns in place; no other number of the weight is read or written."""
        weight.index_copy_(self.dim, self.indices.to(weight.device), rows_or_columns.to(weight.device))


class WrittenUpdates(ABC):
    """Which updates a base weight holds, in the order in which they were added, and what it was before.

    The updates are kept as they were written: what an adapter learns afterwards does not change what is taken out.
    """

    def __init__(self) -> None:
        self.updates: dict[str, SliceUpdate] = {}

    def add(self, layer: AdapterLinear, updates: Mapping[str, SliceUpdate]) -> None:
        """Write updates into the weight of a layer's base, each rounded to its dtype in turn."""
        self._change(layer, {**self.updates, **updates})

    def remove(self, layer: AdapterLinear, names: Collection[str]) -> None:
        """Take updates out: the weight becomes what it would be had only the others been written."""
        self._change(layer, {name: update for name, update in self.updates.items() if name not in names})

    @abstractmethod
    def _change(self, layer: AdapterLinear, updates: dict[str, SliceUpdate]) -> None:
        """Make the weight hold these updates and no other."""


class WrittenInPlace(WrittenUpdates):
    """Updates of a weight of plain numbers: written into its storage, so that all other numbers keep their bits."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def _change(self, layer: AdapterLinear, updates: dict[str, SliceUpdate]) -> None:
        weight = layer.oriented(layer.get_base_weight())
        # Adapters may share rows or columns: those that stay are written anew on what was there before them.
        kept = 0
        for old, new in zip(self.updates, updates, strict=False):
            if old != new:
                break
            kept += 1
        for name in reversed(list(self.updates)[kept:]):
            self.updates.pop(name).put(weight, self._before.pop(name))
        for name in list(updates)[kept:]:
            update = updates[name]
            self._before[name] = update.slice_of(weight)
            update.put(weight, update.sum_with(weight))
            self.updates[name] = update


class WrittenAndRequantized(WrittenUpdates):
    """Updates of a quantized weight: added to what it stands for, which is then quantized again, with loss.

    The quantized weight itself is kept: it comes back bit for bit, and every change starts from it, so that no error
    adds up.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: QuantizedBase | None = None

    @torch.no_grad()
    def _change(self, layer: AdapterLinear, updates: dict[str, SliceUpdate]) -> None:
        if self._before is None:
            self._before = QuantizedBase(layer)
        else:
            self._before.restore(layer)
        self.updates = updates
        if not updates:
            self._before = None
            return
        weight = layer.get_base_weight().clone()
        for update in updates.values():
            update.put(layer.oriented(weight), update.sum_with(layer.oriented(weight)))
        layer.set_base_weight(weight)


class QuantizedBase:
    """A quantized base layer as it is now: what its backend replaces or edits when a weight is set."""

    def __init__(self, layer: AdapterLinear) -> None:
        self.base = layer.get_base_layer()
        self.weight: Tensor | None = getattr(self.base, "weight", None)
        self.weight_attributes = dict(vars(self.weight)) if self.weight is not None else {}
        self.quant_state = getattr(self.base, "quant_state", None)
        self.state = dict(vars(self.base.state)) if hasattr(self.base, "state") else None

    def restore(self, layer: AdapterLinear) -> None:
        """Put everything back."""
        if layer.get_base_layer() is not self.base:
            layer.base_layer = self.base
        if self.weight is not None:
            _reset(self.weight, self.weight_attributes)
            self.base.weight = self.weight
        if self.quant_state is not None:
            self.base.quant_state = self.quant_state
        if self.state is not None:
            _reset(self.base.state, self.state)


def _reset(target: Any, attributes: dict[str, Any]) -> None:
    vars(target).clear()
    vars(target).update(attributes)
