"""Costs of a model that no formula knows: built without weights from its config, and counted as it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rankbits.errors import ModelError, UnknownArchitectureError
from rankbits.recipes.question import checked_keys, config_of
from rankbits.records import CostRecord

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
"""Sizes by the names that every config of transformers answers to, if it has them."""


def count_live(model: str, overrides: Sequence[str], unknown: UnknownArchitectureError) -> tuple[int, CostRecord]:
    """Parameters and cost of the base model, from a live graph on the meta device.

    Args:
        model: a local config or folder, or a hub id in the local cache.
        overrides: `key=value` texts; of them, lengths, head and labels matter here.
        unknown: what the formulas said, raised again where transformers does not know the architecture either.

    Raises:
        UnknownArchitectureError: transformers cannot build it.
        ModelError: a size is below 1, or an operation cannot be counted; the layer is named.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    from rankbits.accounting.measure import cost

    keys = checked_keys(model, overrides)
    config = config_of(model)
    model_type = str(config["model_type"])
    if model_type not in CONFIG_MAPPING:
        raise unknown
    classes: dict[str | None, Any] = {
        "language-model": AutoModelForCausalLM,
        "classification": AutoModelForSequenceClassification,
    }
    what = f"model: {model!r}: transformers cannot build a {model_type} with head={keys.head or 'none'}"
    known = _built(what, lambda: CONFIG_MAPPING[model_type].from_dict(config))
    _refuse_empty(model, known)
    known.num_labels = keys.num_labels
    with torch.device("meta"):
        built = _built(what, lambda: classes.get(keys.head, AutoModel).from_config(known))
    counted = cost(
        built,
        query_len=keys.sequence_length,
        key_len=keys.sequence_length + keys.cache_length,
        source_len=keys.source_length,
    )
    return sum(parameter.numel() for parameter in built.parameters()), counted


def _built(what: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except Exception as reason:
        # Hundreds of model classes raise what they like at a size or a name that they cannot work with.
        raise UnknownArchitectureError(f"{what}: {type(reason).__name__}: {reason}") from reason


def _refuse_empty(model: str, config: Any) -> None:
    """Raise ModelError if a size is below 1: transformers builds a model without layers, and it would cost nothing."""
    for size in SIZES:
        given = getattr(config, size, 1)
        if isinstance(given, int) and given < 1:
            raise ModelError(f"model: {model!r}: config.json: {size}: given {given}, expected at least 1")
