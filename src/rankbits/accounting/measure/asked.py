"""What the user asked to be counted, checked: sizes that are sizes, lengths that the model has, options that exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import nn

from rankbits.accounting.measure.given import given_sizes
from rankbits.accounting.measure.inputs import has_two_stacks, largest_length
from rankbits.errors import ModelError
from rankbits.records import CountOptions

SIZES = ("query_len", "key_len", "source_len")
NOT_LIVE = {
    "lengths": "a live pass computes every row; expected query_len and batch",
    "causal": "a live pass computes the whole square; expected 'dense'",
}
"""Options that only formulas can follow."""


def asked(
    model: nn.Module,
    sequence_length: int | None,
    batch: int | None,
    inputs: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> CountOptions:
    """The options of a count, complete but for what depends on adapters and heads.

    Raises:
        ModelError: an option is unknown or out of range, a length is missing, beyond the model's, or not that of the
            inputs.
    """
    known = sorted({*CountOptions.model_fields} - {*NOT_LIVE} | {"sequence_length", "inputs"})
    for name in options:
        if name not in CountOptions.model_fields:
            raise ModelError(f"cost: given {name}={options[name]!r}, expected one of {', '.join(known)}")
        if name in NOT_LIVE and options[name] not in (None, "dense"):
            raise ModelError(f"{name}: given {options[name]!r}, but {NOT_LIVE[name]}")
    chosen = {name: value for name, value in options.items() if name not in NOT_LIVE and value is not None}
    chosen |= _sizes(model, sequence_length, batch, inputs, chosen)
    try:
        settings = CountOptions(**chosen)
    except ValidationError as error:
        raise ModelError(_problems(error)) from error
    _check_lengths(model, settings)
    return settings


def _sizes(
    model: nn.Module,
    sequence_length: int | None,
    batch: int | None,
    inputs: Mapping[str, Any] | None,
    chosen: Mapping[str, Any],
) -> dict[str, Any]:
    found: dict[str, Any] = {"batch": 1 if batch is None else batch}
    given = [name for name in SIZES if name in chosen]
    if sequence_length is not None and {"query_len", "key_len"} & {*given}:
        raise ModelError(f"sequence_length: given {sequence_length} together with {given}; it sets both")
    if inputs is not None:
        if not isinstance(inputs, Mapping):
            raise ModelError(f"inputs: given a {type(inputs).__name__}, expected a mapping of argument names to values")
        sizes = given_sizes(model, inputs)
        if sizes:
            explicit = [(name, chosen[name], name) for name in given] + [("batch", batch, "batch")]
            explicit += [("sequence_length", sequence_length, name) for name in SIZES]
            _check_inputs(explicit, sizes)
            return sizes
    query = sequence_length if sequence_length is not None else chosen.get("query_len", chosen.get("key_len"))
    if query is None:
        raise ModelError(
            "sequence_length: given none; expected the number of tokens per sequence (or query_len and key_len, or "
            "inputs with [batch, tokens] integers)"
        )
    found |= {"query_len": query, "key_len": chosen.get("key_len", query)}
    if inputs is None and "source_len" not in chosen and has_two_stacks(model):
        found["source_len"] = query
    return found


def _check_inputs(explicit: list[tuple[str, Any, str]], sizes: Mapping[str, int]) -> None:
    """Sizes that are asked for beside inputs, as (argument, value, size), must be those of the inputs."""
    for argument, value, size in explicit:
        if value is not None and size in sizes and value != sizes[size]:
            raise ModelError(
                f"{argument}: given {value} beside inputs, whose {size} is {sizes[size]}; expected the same or none"
            )


def _problems(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: given {problem['input']!r}, expected: {message}" if where else message)
    return "; ".join(lines)


def _check_lengths(model: nn.Module, options: CountOptions) -> None:
    most = largest_length(model)
    for name in SIZES:
        length = getattr(options, name)
        if most is not None and length is not None and length > most:
            raise ModelError(f"{name}: given {length}, expected at most {most}: {type(model).__name__} has no more")
