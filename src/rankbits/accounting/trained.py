"""Which parts of a model a method trains in full: they keep their inputs, have gradients and optimizer states."""

from __future__ import annotations

import re

from rankbits.accounting.params import HEAD_NAMES
from rankbits.accounting.spec import Linear, Method, MethodSpec, ModelShape, Part

_BLOCK = re.compile(r"(.*?)\.(\d+)(?:\.|$)")


def block_of(part: Part) -> tuple[str, int] | None:
    """The stack's name and the number of the block a part lies in; None outside blocks."""
    match = _BLOCK.match(part.name)
    return (match.group(1), int(match.group(2))) if match else None


def trained_in_full(shape: ModelShape, spec: MethodSpec) -> frozenset[str]:
    """Names of the parts whose own weights receive gradients.

    Args:
        shape: the model.
        spec: the method; adapters beside frozen weights are not meant here.
    """
    if spec.method is Method.FULL:
        return frozenset(part.name for part in shape.parts)
    chosen = {part.name for part in shape.parts if _inside(part.name, spec.trained_in_full)}
    if spec.method in {Method.TOP_LAYER, Method.FEATURE_BASED} and not chosen:
        chosen = {part.name for part in shape.linears() if _is_head(part)}
    if spec.method is Method.TOP_LAYER and spec.layers:
        places = [block for part in shape.parts if (block := block_of(part))]
        stack = places[-1][0] if places else ""
        last = sorted({index for name, index in places if name == stack})[-spec.layers :]
        chosen |= {
            part.name for part in shape.parts if (block := block_of(part)) and block[0] == stack and block[1] in last
        }
    return frozenset(chosen)


def _inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(f".{module}." in f".{name}." for module in modules)


def _is_head(linear: Linear) -> bool:
    return linear.op == "head" or not HEAD_NAMES.isdisjoint(linear.name.split("."))
