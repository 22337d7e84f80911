"""CostRecord: every matrix product of one forward pass, from which every cost we print is derived.

A product has nominal widths (those of its operands) and is executed at the width of the kernel that can run it. BOPs
are MACs times the widths of both operands (van Baalen et al. 2020). Totals and percentages are computed from the list
of products when they are asked for and never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rankbits.records.frozen import Frozen

Size = Annotated[int, Field(ge=1)]
Elements = Annotated[int, Field(ge=0)]
Width = Literal[2, 4, 8, 16, 32]
ReferenceBits = Literal[16, 32]
ScaleBits = Literal[32, 16, 8]
Executed = Literal["int4", "int8", "fp16", "fp32"]

REFERENCES: tuple[ReferenceBits, ...] = (16, 32)
"""Widths of the merged base model that costs are compared with, always both."""
INTEGER_KERNELS: tuple[Executed, ...] = ("int4", "int8")
EXECUTED_BITS: dict[Executed, int] = {"int4": 4, "int8": 8, "fp16": 16, "fp32": 32}
SCALE_BYTES = 4
"""One float32 scale per range of a packed tensor."""


def scale_bytes(scales: int, bits: int) -> int:
    """Bytes of the scales of one packed tensor: those narrower than 32 bits share a factor of 4 bytes."""
    shared = SCALE_BYTES if scales and bits < 8 * SCALE_BYTES else 0
    return (scales * bits + 7) // 8 + shared


def executed_as(left: int, right: int, *, float_bits: int = 32, int4: bool = False) -> Executed:
    """The kernel that runs a product of operands `left` and `right` bits wide.

    Both operands of at most 8 bits run as integers, in 4 bits only where an int4 kernel is installed. One narrow
    operand alone is dequantized: it saves bytes and no work. There is no 16-bit integer product.

    Args:
        left: nominal bits of one operand.
        right: nominal bits of the other.
        float_bits: 16 where the deployment runs 32-bit operands in half precision.
        int4: whether an int4 kernel is installed.
    """
    widest = max(left, right)
    if widest <= 4 and int4:
        return "int4"
    if widest <= 8:
        return "int8"
    return "fp16" if widest <= 16 or float_bits == 16 else "fp32"


class CountOptions(Frozen):
    """What was counted. Lengths are tokens; all of this is printed wherever a cost is.

    Args:
        query_len: tokens that are computed, per sequence (of the decoder, if there are two stacks).
        key_len: tokens that attention sees: `query_len` plus those in the cache of a decoder.
        source_len: tokens of the encoder where there are two stacks; it does not run again once the cache is filled.
        batch: sequences.
        lengths: real lengths of the sequences of an encoder's batch, instead of padding to `query_len`.
        causal: "dense" counts the whole square that eager code computes, "triangular" the part a mask leaves.
        adapters: "merged" into the weights, or "unmerged" beside them.
        positions: "cached" leaves out products that do not depend on the input.
        head: language-model head on no, the last or all positions.
        embeddings: whether look-up tables count as parameters and bytes; they are never MACs.
        float_bits: width in which the deployment runs what is not an integer product.
        int4: whether an int4 kernel is installed.
    """

    query_len: Size
    key_len: Size
    source_len: Size | None = None
    batch: Size = 1
    lengths: list[Size] | None = None
    causal: Literal["dense", "triangular"] = "dense"
    adapters: Literal["merged", "unmerged"] = "merged"
    positions: Literal["recomputed", "cached"] = "recomputed"
    head: Literal["out", "last", "all"] = "out"
    embeddings: Literal["out", "in"] = "out"
    float_bits: ReferenceBits = 32
    int4: bool = False

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.key_len < self.query_len:
            raise ValueError(f"key_len: given {self.key_len}, expected at least query_len, which is {self.query_len}")
        if self.lengths is not None and len(self.lengths) != self.batch:
            raise ValueError(f"lengths: given {len(self.lengths)} of them, expected one for each of {self.batch}")
        if self.lengths is not None and max(self.lengths) > self.query_len:
            raise ValueError(f"lengths: given {max(self.lengths)}, expected at most query_len, {self.query_len}")
        if self.lengths is not None and self.cached:
            raise ValueError("lengths: given together with a cache; expected whole sequences")
        return self

    @property
    def cached(self) -> int:
        """Tokens per sequence that a decoder has in its cache."""
        return self.key_len - self.query_len


class Product(Frozen):
    """One product of a `[batch, m, k]` operand with a `[k, n]` or `[batch, k, n]` one.

    Args:
        module: qualified name of the module that runs it.
        op: linear, lora_down, lora_up, scores, context, c2p, p2c, pos_key, pos_query, conv, head and so on.
        batch, m, k, n: its shape; a masked triangle is m = 1 with its area in n or k.
        left, right: names of the operands: x, W0, A, B, q, k, v, p, rel.
        bits_left, bits_right: their nominal widths.
        kind: "weight" for weight by activation, "act" for activation by activation.
        constant: the result does not depend on this call's input.
        adapter: name of the adapter it belongs to, None for the base model.
    """

    module: str
    op: str
    batch: Size
    m: Size
    k: Size
    n: Size
    left: str
    right: str
    bits_left: Width = 32
    bits_right: Width = 32
    kind: Literal["weight", "act"]
    constant: bool = False
    adapter: str | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.batch * self.m * self.k * self.n

    @property
    def bops(self) -> int:
        """Bit operations at nominal widths."""
        return self.macs * self.bits_left * self.bits_right

    def executed(self, options: CountOptions) -> Executed:
        """The kernel that runs it in the deployment that the options describe."""
        return executed_as(self.bits_left, self.bits_right, float_bits=options.float_bits, int4=options.int4)


class ElementWork(Frozen):
    """Work that is no matrix product: how many elements a step (bias, softmax, norm, activation ...) writes."""

    module: str
    op: str
    elements: Elements


class WeightRecord(Frozen):
    """One tensor that has to be kept for inference, at its nominal width.

    Args:
        module: qualified name of its module.
        operand: W0, bias, A, E, B, table, norm, indices.
        elements: how many numbers.
        bits: width of each.
        scales: ranges that come with it when it is packed.
        scale_bits: width of each.
        adapter: name of the adapter it belongs to, None for the base model.
    """

    module: str
    operand: str
    elements: Elements
    bits: Width = 32
    scales: Elements = 0
    scale_bits: ScaleBits = Field(default=32, exclude_if=lambda bits: bits == 32)
    adapter: str | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes when packed without gaps, with its scales."""
        return (self.elements * self.bits + 7) // 8 + scale_bytes(self.scales, self.scale_bits)


class CostRecord(Frozen):
    """What one forward pass costs, under `options`.

    `reference_macs` are those of the merged base model under the same options: the one reference for every method.
    """

    options: CountOptions
    products: list[Product]
    reference_macs: Elements
    elements: list[ElementWork] = Field(default_factory=list)
    weights: list[WeightRecord] = Field(default_factory=list)

    def __repr__(self) -> str:
        """One line: the lists can have thousands of entries, and `rankbits.cost_table` prints what they add up to."""
        return f"CostRecord({len(self.products)} products, {self.macs:,} MACs, {self.bops:,} nominal BOPs)"

    __str__ = __repr__

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all products."""
        return sum(product.macs for product in self.products)

    @property
    def bops(self) -> int:
        """Bit operations at nominal widths."""
        return sum(product.bops for product in self.products)

    @property
    def executable_bops(self) -> int:
        """Bit operations at the widths of the kernels that run the products."""
        return sum(p.macs * EXECUTED_BITS[p.executed(self.options)] ** 2 for p in self.products)

    @property
    def element_operations(self) -> int:
        """Elements written outside matrix products."""
        return sum(work.elements for work in self.elements)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights at their nominal widths, with scales: packed, if an export packs them."""
        return sum(weight.size_bytes for weight in self.weights)

    def reference_bops(self, bits: ReferenceBits) -> int:
        """Bit operations of the merged base model with all operands `bits` wide."""
        return self.reference_macs * bits * bits

    def percent(self, reference: ReferenceBits, *, executable: bool = False) -> float:
        """Bit operations in percent of the merged base model's at `reference` bits; NaN where that has none."""
        whole = self.reference_bops(reference)
        return 100 * (self.executable_bops if executable else self.bops) / whole if whole else float("nan")

    @property
    def integer_share(self) -> float:
        """Share of MACs, 0 to 1, that an integer kernel can execute."""
        return self._share(lambda product: product.executed(self.options) in INTEGER_KERNELS)

    @property
    def adapter_share(self) -> float:
        """Share of MACs, 0 to 1, that adapters add beside the base model."""
        return self._share(lambda product: product.adapter is not None)

    def mean_bits_by_parameters(self) -> float | None:
        """Mean width of the weights, each number counted once (memory); None without weights."""
        return _weighted((w.bits, w.elements) for w in self.weights)

    def mean_weight_bits_by_macs(self) -> float | None:
        """Mean width of the weights in products, each MAC counted once (compute); None without such products."""
        return _weighted((p.bits_right, p.macs) for p in self.products if p.kind == "weight")

    def macs_by(self, key: Callable[[Product], str]) -> dict[str, int]:
        """MACs summed by a name that `key` gives each product, largest first."""
        return self._sums(key, lambda product: product.macs)

    def bops_by(self, key: Callable[[Product], str]) -> dict[str, int]:
        """Nominal bit operations summed by a name that `key` gives each product, largest first."""
        return self._sums(key, lambda product: product.bops)

    def counted(self) -> dict[str, int]:
        """How many products of each kind (`op`) were counted, in the order they first ran."""
        counts: dict[str, int] = {}
        for product in self.products:
            counts[product.op] = counts.get(product.op, 0) + 1
        return counts

    def _share(self, belongs: Callable[[Product], bool]) -> float:
        return sum(p.macs for p in self.products if belongs(p)) / self.macs if self.macs else 0.0

    def _sums(self, key: Callable[[Product], str], amount: Callable[[Product], int]) -> dict[str, int]:
        sums: dict[str, int] = {}
        for product in self.products:
            sums[key(product)] = sums.get(key(product), 0) + amount(product)
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _weighted(pairs: Iterable[tuple[int, int]]) -> float | None:
    total = weight = 0
    for value, count in pairs:
        total += value * count
        weight += count
    return total / weight if weight else None
