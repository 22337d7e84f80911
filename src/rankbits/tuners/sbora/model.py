"""The SBoRA tuner: what PEFT calls to put adapters into a model, several tasks side by side, and to take them out."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn

from rankbits.tuners.linear import LinearTuner
from rankbits.tuners.sbora.layer import SboraLinear


class SboraModel(LinearTuner):
    """A model with SBoRA adapters in its linear layers; made by `peft.get_peft_model`."""

    prefix = "sbora_"
    layer_class = SboraLinear
    tuner_layer_cls = SboraLinear

    def unmerge_adapter(self, adapter_names: list[str] | None = None) -> None:
        """Take merged adapters out of the base weights, in any order, bit for bit.

        Args:
            adapter_names: which of them; all if None.

        Raises:
            ValueError: one of them is merged nowhere; nothing has changed.
        """
        layers = [layer for _, layer in sbora_layers(self.model)]
        if adapter_names is not None:
            merged = {name for layer in layers for name in layer.merged_adapters}
            missing = sorted(set(adapter_names) - merged)
            if missing:
                raise ValueError(f"adapters {missing} cannot be unmerged: merged are {sorted(merged)}")
        for layer in layers:
            if adapter_names is None or set(adapter_names) & set(layer.merged_adapters):
                with onload_layer(layer):
                    layer.unmerge(adapter_names)

    @classmethod
    def check_saved(cls, model: nn.Module, adapter_name: str, entries: dict[str, Tensor]) -> None:
        """Check also the rows or columns that a saved adapter has.

        Raises:
            ValueError: a layer does not have them, or they belong to an adapter that has to be disjoint.
        """
        super().check_saved(model, adapter_name, entries)
        for name, layer in sbora_layers(model):
            saved = entries.get(f"{name}.sbora_indices.{adapter_name}")
            if saved is not None and adapter_name in layer.sbora_indices:
                layer.check_saved(adapter_name, saved.tolist(), name)


def sbora_layers(model: nn.Module) -> Iterator[tuple[str, SboraLinear]]:
    """All SBoRA layers of a model with their qualified names, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, SboraLinear):
            yield name, module
