"""What a model is run with: token ids of the asked sizes, or what the user gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankbits.errors import ModelError
from rankbits.records import CountOptions

OFFSET_POSITIONS = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "xmod"}
)
"""Models that number positions from behind the padding token, so that many rows of the table are never used."""
INDEPENDENT = frozenset({"position_ids", "cache_position"})
"""Inputs that are the same in every call of the same size."""


@dataclass(frozen=True, slots=True)
class Feed:
    """The calls of one pass.

    Args:
        arguments: of the call that is counted.
        prefill: of the call before it, which fills the cache and is not counted; None if there is no cache.
    """

    arguments: dict[str, Any]
    prefill: dict[str, Any] | None = None

    def after(self, output: Any) -> dict[str, Any]:
        """Arguments of the counted call, with what the call before it left.

        Raises:
            ModelError: it left no cache.
        """
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise ModelError("key_len: given larger than query_len, but the model keeps no cache; expected them equal")
        filled = {**self.arguments, "past_key_values": cache, "use_cache": True}
        state = getattr(output, "encoder_last_hidden_state", None)
        if state is not None:
            filled["encoder_outputs"] = (state,)
        return filled


def feeds(model: nn.Module, options: CountOptions) -> Iterator[Feed]:
    """Ways to call a transformers model with the asked sizes; on the meta device the next one if one cannot run.

    Without memory there is no value to ask a mask for, and models differ in which mask they ask nothing of.

    Raises:
        ModelError: the model is not one of tokens, has one stack only, or has no cache.
    """
    parameters = inspect.signature(model.forward).parameters
    _check_kind(model, parameters, options)
    source, device = options.source_len, device_of(model)
    two_stacks = source is not None
    ids = "decoder_input_ids" if two_stacks else "input_ids"
    for masks in (0, 2, 4) if device.type == "meta" else (0,):
        use_cache = {"use_cache": options.cached > 0} if "use_cache" in parameters else {}
        arguments = {ids: _ids(model, options, options.query_len), **use_cache}
        arguments |= _masks(parameters, masks, options, options.query_len, options.key_len)
        first: dict[str, Any] = {"input_ids": _ids(model, options, source)} if source is not None else {}
        if not options.cached:
            yield Feed(first | arguments)
            continue
        before = {ids: _ids(model, options, options.cached), "use_cache": True}
        before |= _masks(parameters, masks, options, options.cached, options.cached)
        yield Feed(arguments, prefill=first | before)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _check_kind(model: nn.Module, parameters: Mapping[str, Any], options: CountOptions) -> None:
    if getattr(model, "config", None) is None or "input_ids" not in parameters:
        raise ModelError(
            f"{type(model).__name__} takes {', '.join(parameters) or 'nothing'}: expected a transformers model of "
            "input_ids, or inputs={name: tensor} with what its forward takes"
        )
    if options.source_len is not None and "decoder_input_ids" not in parameters:
        raise ModelError(
            f"source_len: given {options.source_len}, but {type(model).__name__} has one stack; expected none"
        )
    if options.cached and "past_key_values" not in parameters:
        raise ModelError(
            f"key_len: given {options.key_len} with query_len {options.query_len}, but {type(model).__name__} keeps "
            "no cache; expected them equal"
        )


def _ids(model: nn.Module, options: CountOptions, length: int) -> Tensor:
    """[batch, length] of one ordinary token, with an end at the end, which some heads look for."""
    config: Any = model.config
    special = {getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "decoder_start")}
    size = getattr(config, "vocab_size", None) or 2
    token = next((number for number in range(1, size) if number not in special), 0)
    ids = torch.full((options.batch, length), token, dtype=torch.long)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < size:
        ids[:, -1] = end
    return ids.to(device_of(model))


def _masks(
    parameters: Mapping[str, Any], axes: int, options: CountOptions, rows: int, columns: int
) -> dict[str, Tensor]:
    """An attention mask of 2 or 4 axes that hides nothing, with the positions of its rows; nothing for 0 axes."""
    if not axes:
        return {}
    shape = (options.batch, columns) if axes == 2 else (options.batch, 1, rows, columns)
    decoder = "decoder_attention_mask" if "decoder_input_ids" in parameters else "attention_mask"
    given = {decoder: torch.ones(shape, device="meta", dtype=torch.long if axes == 2 else torch.float32)}
    if "position_ids" in parameters:
        positions = torch.arange(columns - rows, columns, device="meta")
        given["position_ids"] = positions.expand(options.batch, rows)
    return {name: value for name, value in given.items() if name in parameters}


def largest_length(model: nn.Module) -> int | None:
    """Tokens that a model has positions for, None where its config names no such number."""
    config: Any = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    unused = getattr(config, "pad_token_id", None) if config.model_type in OFFSET_POSITIONS else None
    return most - unused - 1 if isinstance(unused, int) else most


def has_two_stacks(model: nn.Module) -> bool:
    """Whether a model takes ids for an encoder and for a decoder."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters
