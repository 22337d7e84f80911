"""Which parts of a model a method trains in full: they keep their inputs, have gradients and optimizer states."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from rankbits.accounting.spec import Linear, Method, MethodSpec, ModelShape, Part
from rankbits.errors import ModelError

_BLOCK = re.compile(r"(.*?)\.(\d+)(?:\.|$)")
"""The stack's name and the number of the block that a part's name begins with."""
NOT_ALL_LINEAR = frozenset({"score", "classifier"})
"""Names of classification heads that PEFT leaves out of "all-linear"."""
HEAD_NAMES = NOT_ALL_LINEAR | {"classification_head"}
"""Names of classification heads, those of models of two stacks too."""


def trained_in_full(shape: ModelShape, spec: MethodSpec) -> frozenset[str]:
    """Names of the parts whose own weights receive gradients.

    Args:
        shape: the model.
        spec: the method; adapters beside frozen weights are not meant here.

    Raises:
        ModelError: the model has fewer blocks than are to be trained.
    """
    if spec.method is Method.FULL:
        return frozenset(part.name for part in shape.parts)
    chosen = {part.name for part in shape.parts if inside(part.name, spec.trained_in_full)}
    if spec.method in {Method.TOP_LAYER, Method.FEATURE_BASED} and not chosen:
        chosen = {part.name for part in shape.parts if inside(part.name, above_body(shape))}
    if spec.method is Method.TOP_LAYER:
        chosen |= {part.name for part in top_blocks(shape, spec.layers)}
    return frozenset(chosen)


def top_blocks(shape: ModelShape, layers: int) -> list[Part]:
    """The parts of the last blocks of the stack that ends the model.

    Raises:
        ModelError: it has fewer blocks.
    """
    numbered = [(place, part) for part in shape.parts if (place := block_of(part)) is not None]
    stack = numbered[-1][0][0] if numbered else ""
    blocks = sorted({index for (name, index), _ in numbered if name == stack})
    if not 0 <= layers <= len(blocks):
        raise ModelError(f"layers: given {layers} top blocks of {shape.name}, expected 0 to {len(blocks)}")
    chosen = {(stack, index) for index in blocks[len(blocks) - layers :]}
    return [part for place, part in numbered if place in chosen]


def block_of(part: Part) -> tuple[str, int] | None:
    """The stack's name and the number of the block a part lies in; None outside blocks."""
    match = _BLOCK.match(part.name)
    return (match.group(1), int(match.group(2))) if match else None


def above_body(shape: ModelShape) -> tuple[str, ...]:
    """Names of the modules that stand on the body: a classifier with what belongs to it, or a language model's head.

    A pooler is part of BERT's body, which is pre-trained with it, and not of DeBERTa's, where it is as new as the
    classifier. A head that is tied to the table of embeddings belongs to the body.
    """
    numbered = [(index, part) for index, part in enumerate(shape.parts) if block_of(part) is not None]
    if not numbered or not any(is_head(linear) for linear in shape.linears()):
        return ()
    last, block = numbered[-1]
    tied = {linear.name for linear in shape.linears() if linear.tied_to is not None}
    firsts = [part.name.partition(".")[0] for part in shape.parts[last + 1 :] if part.name not in tied]
    return tuple(dict.fromkeys(first for first in firsts if first != block.name.partition(".")[0]))


def inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a part lies in one of the modules, each given by the end of its own name."""
    return any(f".{module}." in f".{name}." for module in modules)


def is_head(linear: Linear, names: Collection[str] = HEAD_NAMES) -> bool:
    """Whether a layer is the head of a language model, or lies in a classification head of one of these names."""
    return linear.op == "head" or any(name in names for name in linear.name.split("."))
