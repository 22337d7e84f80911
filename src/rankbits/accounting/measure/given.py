"""The user's own inputs: which sizes they have, and a copy of them for each pass, because a pass fills caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from rankbits.accounting.measure.inputs import has_two_stacks
from rankbits.accounting.measure.provenance import tensors_in
from rankbits.errors import ModelError

ENCODER = ("input_ids", "inputs_embeds", "encoder_outputs")
"""Inputs that have the length of the only stack, or of the encoder."""
DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
"""Inputs that have the length of the decoder; it makes its own of the labels, or of the encoder's, if it has none."""


def given_sizes(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Fields of `CountOptions` that inputs tell: batch, query_len, key_len and source_len; empty if they tell nothing.

    Args:
        model: what runs with them: two stacks name their inputs otherwise than one.
        inputs: what `forward` takes, by name. The length of a cache joins the keys. Of a model that takes none of the
            usual names the first [batch, tokens] integers count.
    """
    cache = inputs.get("past_key_values")
    two_stacks = has_two_stacks(model)
    encoder = _first(inputs, ENCODER)
    tokens = (_first(inputs, DECODER) or encoder) if two_stacks else (encoder or _first(inputs, tuple(inputs)))
    if tokens is None:
        return {}
    batch, length = tokens
    found = {"batch": batch, "query_len": length, "key_len": length + _cached(cache)}
    source = encoder[1] if encoder is not None else _cached(getattr(cache, "cross_attention_cache", None))
    return found | ({"source_len": source} if two_stacks and source else {})


def copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that share no memory with those of the user: a decoder writes into its cache.

    Raises:
        ModelError: one of them cannot be copied.
    """
    # Python refuses to copy tensors that carry gradients, such as those of a cache filled outside no_grad.
    known = {id(tensor): tensor.detach().clone() for tensor in _held(inputs, set())}
    found = {}
    for name, value in inputs.items():
        try:
            found[name] = deepcopy(value, known)
        except (TypeError, RuntimeError, ValueError) as error:
            raise ModelError(
                f"inputs: {name} is a {type(value).__name__}, which cannot be copied ({error}); expected tensors, "
                "numbers and caches of them"
            ) from error
    return found


def _first(inputs: Mapping[str, Any], names: tuple[str, ...]) -> tuple[int, int] | None:
    """(batch, tokens) of the first of these inputs that has them: [batch, tokens] integers or [batch, tokens, d]."""
    for name in names:
        value = inputs.get(name)
        if name == "encoder_outputs":
            value = next(tensors_in(value), None)
        axes = 3 if name == "encoder_outputs" or name.endswith("inputs_embeds") else 2
        if isinstance(value, Tensor) and value.dim() == axes and (axes == 3 or not value.is_floating_point()):
            return int(value.shape[0]), int(value.shape[1])
    return None


def _cached(cache: Any) -> int:
    """Tokens that a cache holds: one of transformers, or pairs of [batch, heads, tokens, width]."""
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    first = next(tensors_in(cache), None)
    return 0 if first is None else int(first.shape[-2])


def _held(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors inside containers and plain objects."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    parts: Any = value if isinstance(value, list | tuple) else []
    if isinstance(value, Mapping):
        parts = value.values()
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        parts = [*parts, *vars(value).values()]
    for part in parts:
        yield from _held(part, seen)
