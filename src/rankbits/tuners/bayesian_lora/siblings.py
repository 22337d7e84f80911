"""Which layers read the same tensor, by the names that architectures give them."""

from __future__ import annotations

from torch import nn

PROJECTIONS = (
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
)
"""Names of an attention's children that make queries, keys and values; the last are those of diffusers."""
READERS_OF_ONE_TENSOR = (
    *map(frozenset, PROJECTIONS),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"wi_0", "wi_1"}),
    frozenset({"w1", "w3"}),
    frozenset({"add_q_proj", "add_k_proj", "add_v_proj"}),
)
"""Names of children of one module that read the same tensor; the last are those of diffusers."""
QUERIES = frozenset(queries for queries, _, _ in PROJECTIONS)
"""In cross-attention the queries read another tensor than keys and values."""
CROSS_ATTENTION = ("encdecattention", "encoder_attn", "crossattention", "cross_attn")


def sibling_names(parent: nn.Module, key: str) -> tuple[str, ...]:
    """Names of the children of a module that read the tensor a layer reads, itself included, in module order.

    Args:
        parent: the module that the layer is a child of.
        key: qualified name of the layer.
    """
    path, _, own = key.rpartition(".")
    group = next((names for names in READERS_OF_ONE_TENSOR if own in names), frozenset({own}))
    if _is_cross_attention(parent, path, own):
        group = group & QUERIES if own in QUERIES else group - QUERIES
    return tuple(name for name, _ in parent.named_children() if name in group)


def _is_cross_attention(parent: nn.Module, path: str, own: str) -> bool:
    if own.startswith("to_"):
        # In diffusers both kinds of attention have one class and no telling name; most say which they are.
        return bool(getattr(parent, "is_cross_attention", True))
    return any(mark in path.lower() for mark in CROSS_ATTENTION)


def projection_names(block: nn.Module) -> tuple[str, str, str] | None:
    """Names of the children of a module that make queries, keys and values; None if it has no such children."""
    return next((names for names in PROJECTIONS if all(hasattr(block, name) for name in names)), None)
