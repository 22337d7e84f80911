"""Bits of operands: which learned width of which layer reaches which matrix product."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rankbits.accounting.params import quantized_heads
from rankbits.accounting.quantizers import PROBABILITIES
from rankbits.accounting.spec import Attention, Method, MethodSpec, ModelShape
from rankbits.accounting.trained import trained_in_full
from rankbits.records import Product

FLOAT = 32
"""Width of whatever has no quantizer: unknown is 32, never omitted."""
FOUR_BIT_BASES = frozenset({Method.QLORA, Method.QDORA, Method.QSBORA_FA, Method.QSBORA_FB})

_SITE_OF_OPERAND = {"x": "input", "rel": "input", "W0": "weight", "A": "down", "B": "up", "h": "diagonal_output"}


def with_widths(
    products: Sequence[Product], shape: ModelShape, spec: MethodSpec | None, *, merged: bool
) -> list[Product]:
    """The products with the width of each operand.

    A weight or an input has its quantizer's width. A layer's output has its output quantizer's, and keeps it on the way
    into attention unless positions rotate it. Attention probabilities are floats. Where they have a quantizer, all
    operands are rounded where the products read them, behind any rotation. A merged weight Q(W0) + B E A lies on no
    grid, so it is a float, and so is the weight of a merged 4-bit base; a merged weight
    Q(W0 + B E A) keeps its width. Beside each other, W0 and B E A are floats until their sum is rounded.

    Args:
        products: as listed by the formulas, all 32 bits wide.
        shape: the model.
        spec: the method, with its widths; None is the base model.
        merged: whether adapters have become part of the weights.
    """
    if spec is None or (merged and not spec.widths):
        return list(products)
    attentions = {attention.name: attention for attention in shape.attentions()}
    shared = {linear.name for linear in shape.linears() if linear.position_rows}
    heads = {linear.name for linear in quantized_heads(shape, spec)}
    narrow = four_bit_layers(shape, spec) if spec.method in FOUR_BIT_BASES else frozenset[str]()
    widened = []
    for product in products:
        attention = attentions.get(product.module)
        if product.kind == "act" and attention is not None:
            bits = _attended_bits(attention, shared, spec.widths)
            bits = {name: bits.get(name, FLOAT) for name in (product.left, product.right)}
        else:
            own = spec.widths.get(product.module, {})
            bits = {name: own.get(_SITE_OF_OPERAND.get(name, ""), FLOAT) for name in (product.left, product.right)}
            if product.right == "W0":
                leaves_grid = merged and not spec.rounds_sum and product.module not in heads
                bits["W0"] = FLOAT if leaves_grid else 4 if product.module in narrow else bits["W0"]
        widened.append(product.model_copy(update={"bits_left": bits[product.left], "bits_right": bits[product.right]}))
    return widened


def _attended_bits(
    attention: Attention, shared: Collection[str], widths: Mapping[str, Mapping[str, int]]
) -> dict[str, int]:
    """Width of each operand of attention; what positions rotate is no longer a layer's output, unless rounded then."""
    made_by = {"v": attention.values}
    probabilities = widths.get(attention.values, {}).get(PROBABILITIES)
    if not attention.rotary or probabilities is not None:
        made_by |= {"q": attention.queries, "k": attention.keys}
    positions = {"pos_k": attention.keys, "pos_q": attention.queries}
    made_by |= {operand: layer for operand, layer in positions.items() if layer in shared}
    bits = {operand: widths.get(layer, {}).get("output", FLOAT) for operand, layer in made_by.items()}
    return bits if probabilities is None else bits | {"p": probabilities}


def four_bit_layers(shape: ModelShape, spec: MethodSpec) -> frozenset[str]:
    """What a 4-bit base holds in 4 bits (Dettmers et al. 2023): linear layers but heads and what is trained in full.

    A weight that is tied to a look-up table stays as wide as the table.
    """
    trained = trained_in_full(shape, spec)
    linears = (linear for linear in shape.linears() if linear.op != "head" and linear.tied_to is None)
    return frozenset(linear.name for linear in linears if linear.name not in trained)
