"""A whole model with the update in its weights, as transformers alone loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rankbits.errors import ExportError, MergeError
from rankbits.export.active import tuner_layers
from rankbits.export.copies import sharing_copy
from rankbits.tuners.bayesian_lora import BayesianLoraLinear
from rankbits.tuners.bayesian_lora.config import ACTIVATION_SITES
from rankbits.tuners.linear import AdapterLinear


def prepare(model: PeftModel, adapter_name: str) -> Callable[[Path], None]:
    """Merge an adapter into a copy of its model.

    The copy shares every tensor with the model but the adapted weights, so that merging takes memory for these once
    more, and the model stays as it is whatever happens.

    Args:
        model: a PEFT model on a transformers model.
        adapter_name: its one active adapter.

    Returns:
        What writes the merged model into an empty folder with `save_pretrained`.

    Raises:
        ExportError: no plain model computes what this one does.
    """
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise ExportError(
            f"to='merged' writes a transformers model, but the base is a {type(base).__name__}: use to='lora', or "
            "model.merge_and_unload() and torch.save"
        )
    _refuse_quantized(base, model)
    _refuse_what_weights_cannot_do(model, adapter_name)
    _refuse_tied(base, model)
    adapted = [parameter for _, layer in tuner_layers(model) for parameter in layer.get_base_layer().parameters()]
    try:
        merged = sharing_copy(model, own=adapted).merge_and_unload(safe_merge=True)
    except (MergeError, ValueError, TypeError, NotImplementedError) as reason:
        raise ExportError(f"adapter {adapter_name!r} cannot be merged: {reason}") from reason
    return lambda folder: cast(PreTrainedModel, merged).save_pretrained(str(folder))


def _refuse_quantized(base: PreTrainedModel, model: PeftModel) -> None:
    layers = [n for n, la in tuner_layers(model) if isinstance(la, AdapterLinear) and la.quantization_backend]
    if layers or getattr(base, "hf_quantizer", None) is not None or hasattr(base.config, "quantization_config"):
        where = f"{layers[0]!r} is" if layers else "its weights are"
        raise ExportError(
            f"the base is quantized ({where} stored as codes): merging would round the sum to their grid again and "
            "lose small updates. Use to='lora', or load the base unquantized, put the adapter onto that and export it"
        )


def _refuse_what_weights_cannot_do(model: PeftModel, adapter_name: str) -> None:
    for name, layer in tuner_layers(model):
        if not isinstance(layer, AdapterLinear) or adapter_name not in layer._get_available_adapters():
            continue
        try:
            layer.check_mergeable([adapter_name])
        except MergeError as reason:
            raise ExportError(f"{name!r}: {reason}") from reason
        if not isinstance(layer, BayesianLoraLinear):
            continue
        rounded = [site.value for site in layer.effective_sites(adapter_name) if site in ACTIVATION_SITES]
        if rounded:
            raise ExportError(
                f"{name!r} quantizes the activations {rounded}, which a plain transformers model does not: what was "
                "trained with quantizers=['weight'], or without any, can leave as to='merged'"
            )


def _refuse_tied(base: PreTrainedModel, model: PeftModel) -> None:
    """Raise ExportError if an adapted weight is another module's, too: merging would change what that one computes."""
    owners: dict[int, list[str]] = {}
    for name, module in base.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name, layer in tuner_layers(model):
        weight = getattr(layer.get_base_layer(), "weight", None)
        others = [owner for owner in owners.get(id(weight), []) if not _within(owner, name)]
        if isinstance(weight, nn.Parameter) and others:
            raise ExportError(
                f"{name!r} shares its weight with {others[0]!r}, which merging would change, too: use to='lora', or "
                "leave the layer out with exclude_modules"
            )


def _within(owner: str, layer: str) -> bool:
    return owner == layer or owner.startswith(f"{layer}.")
