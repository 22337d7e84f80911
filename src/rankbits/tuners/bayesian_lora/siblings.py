"""Which layers read the same tensor, by the names that architectures give them."""

from __future__ import annotations

from torch import nn

READERS_OF_ONE_TENSOR = (
    frozenset({"query", "key", "value"}),
    frozenset({"query_proj", "key_proj", "value_proj"}),
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"q_lin", "k_lin", "v_lin"}),
    frozenset({"q", "k", "v"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"wi_0", "wi_1"}),
    frozenset({"w1", "w3"}),
)
"""Names of children of one module that read the same tensor, in the architectures of transformers."""
QUERIES = frozenset({"query", "query_proj", "q_proj", "q_lin", "q"})
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
    if any(mark in path.lower() for mark in CROSS_ATTENTION):
        group = group & QUERIES if own in QUERIES else group - QUERIES
    return tuple(name for name, _ in parent.named_children() if name in group)
