"""Which products and weights of a model a budget counts, as terms over its gates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from rankbits.accounting.architectures.read import Head, read_shape
from rankbits.accounting.budget import Budget, Quantity, Scope
from rankbits.accounting.macs import products
from rankbits.accounting.measure.quantized import opaque_weight_bits, scale_count
from rankbits.accounting.spec import Method, MethodSpec, ModelShape
from rankbits.errors import ModelError, ScheduleError
from rankbits.records import CountOptions, Product
from rankbits.records.costs import SCALE_BYTES, scale_bytes
from rankbits.training.cost_terms import Cost, Term, Terms
from rankbits.training.gate_table import GateTable
from rankbits.tuners.bayesian_lora import BayesianLoraLinear, GatedLayer, gated_layers
from rankbits.tuners.bayesian_lora.config import Placement, Site
from rankbits.tuners.bayesian_lora.head import base_key

FLOAT = 32
"""Width of whatever has no quantizer."""
BITS_PER_BYTE = 8
CODED_WIDTHS = (2, 4, 8, 16)
"""Digits by which a quantizer is recognised in a product; 32 bits tell that there is none."""

Factor = tuple[int, int | None]
"""The width of one operand: a constant, and the slot of a gated width or None."""


@dataclass(frozen=True)
class Priced:
    """An adapter on one layer, or a quantized head of it.

    Args:
        name: name of the layer in the base model.
        layer: the layer.
        adapter: name of the adapter.
    """

    name: str
    layer: GatedLayer
    adapter: str

    @property
    def is_head(self) -> bool:
        """Whether the layer is trained in full, without a low-rank update."""
        return not isinstance(self.layer, BayesianLoraLinear)

    @property
    def merged(self) -> bool:
        """Whether nothing lies beside the weight at inference: an update is within it on its grid, or there is none."""
        if not isinstance(self.layer, BayesianLoraLinear):
            return True
        merged = self.layer.placement_of(self.adapter) is Placement.MERGED
        return merged and self.layer.quantizer_of(self.adapter, Site.WEIGHT) is not None

    @property
    def rank(self) -> int:
        """Ranks that the adapter holds; none in a head."""
        if not isinstance(self.layer, BayesianLoraLinear):
            return 0
        return int(self.layer.bayesian_lora_down[self.adapter].shape[0])

    @property
    def base_macs(self) -> int:
        """Multiply-accumulates of one row with the weight."""
        return self.layer.in_features * self.layer.out_features


class ModelCost:
    """Builds the cost of a model for one budget after another.

    Args:
        model: a PEFT model, or a model with injected adapters.
        table: its gates.
    """

    def __init__(self, model: nn.Module, table: GateTable) -> None:
        self.base = _base_of(model)
        self.table = table
        self.starts = table.width_starts()
        self.priced = list(_priced(self.base))

    def learns(self, site: Site) -> bool:
        """Whether some layer learns the width of a site."""
        return any(p.layer.gate_of(p.adapter, site) is not None for p in self.priced)

    def kept_widths(self) -> list[int]:
        """Widths, without repetition, of weights that keep the grid that the base was loaded with."""
        return sorted({bits for p in self.priced if (bits := _kept_width(p)) is not None})

    def cost(self, budget: Budget) -> Cost:
        """The cost that a budget limits.

        Raises:
            ScheduleError: the scope is the whole model, and no formula knows its architecture or length.
        """
        if budget.quantity is Quantity.RANK:
            ranked = [p for p in self.priced if self.table.rank_slot(p.layer, p.adapter) is not None]
            terms = self._terms((1, None, None, self._rank(p)[1]) for p in ranked)
            return Cost(terms, float(len(ranked)))
        if budget.quantity is Quantity.BOPS:
            return self._operations(budget)
        weights = [(p, site, size) for p in self.priced for site, size in _weights(p)]
        stored = [self._stored(p, site, size) for p, site, size in weights]
        if budget.quantity is Quantity.BITS:
            numbers = [self._ranked(p, (size, None, None, None), site is not Site.WEIGHT) for p, site, size in weights]
            return Cost(self._terms(stored), self._terms(numbers), presses_ranks=False)
        scales = sum(_scale_bytes(p, site) for p, site, _ in weights) * BITS_PER_BYTE
        terms = self._terms([*stored, (scales, None, None, None)], unit=BITS_PER_BYTE)
        return Cost(terms, float(sum(p.base_macs for p in self.priced) * budget.reference_bits))

    def _terms(self, terms: Any, *, unit: int = 1) -> Terms:
        return Terms(terms, self.table.width_rows, self.table.rank_rows, unit=unit)

    def _stored(self, priced: Priced, site: Site, size: int) -> Term:
        constant, slot = self._width(priced, site)
        return self._ranked(priced, (constant * size, slot, None, None), site is not Site.WEIGHT)

    def _ranked(self, priced: Priced, term: Term, depends: bool) -> Term:
        """A term times the rank of its layer, if it depends on that."""
        if not depends:
            return term
        constant, slot = self._rank(priced)
        return (term[0] * constant, term[1], term[2], slot)

    def _rank(self, priced: Priced) -> Factor:
        slot = self.table.rank_slot(priced.layer, priced.adapter)
        return (priced.rank, None) if slot is None else (1, slot)

    def _width(self, priced: Priced, site: Site) -> Factor:
        """Width of what a site's quantizer reads, whichever layer owns the gates that decide it."""
        gated = priced.layer.gate_of(priced.adapter, site)
        if gated is not None and id(gated[0]) in self.starts:
            return 1, self.starts[id(gated[0])] + gated[1]
        fixed = getattr(priced.layer.quantizer_of(priced.adapter, site), "bits", None)
        if fixed is None and site is Site.WEIGHT:
            fixed = _kept_width(priced)
        return (FLOAT if fixed is None else int(fixed)), None

    def _operations(self, budget: Budget) -> Cost:
        counted = self._counted(budget)
        if counted is None:
            terms = [term for p in self.priced for term in self._layer_terms(p)]
            return Cost(self._terms(terms), float(sum(p.base_macs for p in self.priced) * budget.reference_bits**2))
        terms = [term for product, factors in counted for term in self._product_terms(product, factors)]
        base = sum(product.macs for product, _ in counted if product.adapter is None)
        return Cost(self._terms(terms), float(base * budget.reference_bits**2))

    def _layer_terms(self, priced: Priced) -> Iterator[Term]:
        """Bit operations of one row: d1 d2 b_w b_x, and in the paper's placement r d2 b_a b_x + d1 r b_b b_QE."""
        x = self._width(priced, Site.INPUT)
        yield _product(priced.base_macs, self._width(priced, Site.WEIGHT), x)
        if not priced.merged:
            layer = priced.layer
            down = _product(layer.in_features, self._width(priced, Site.DOWN), x)
            up = _product(layer.out_features, self._width(priced, Site.UP), self._width(priced, Site.DIAGONAL_OUTPUT))
            yield self._ranked(priced, down, True)
            yield self._ranked(priced, up, True)

    def _product_terms(self, product: Product, factors: tuple[Factor, Factor]) -> Iterator[Term]:
        owner = next((p for p in self.priced if p.name == product.module), None)
        if product.adapter is None:
            yield _product(product.macs, *factors)
        elif owner is not None and not owner.merged:
            yield self._ranked(owner, _product(product.macs // owner.rank, *factors), True)

    def _counted(self, budget: Budget) -> list[tuple[Product, tuple[Factor, Factor]]] | None:
        """Every product that the budget counts with the widths of its operands, by the accounting's formulas.

        None where these are not needed: without a length, the rows of all layers are alike.
        """
        if budget.sequence_length is None:
            return None
        try:
            listed = self._listed(budget.sequence_length)
        except ModelError as reason:
            if budget.scope is Scope.MODEL:
                raise ScheduleError(
                    f"budget {budget} of the whole model cannot be counted: {reason}; give scope='adapted', which "
                    "counts the adapted linear layers"
                ) from reason
            return None
        adapted = {p.name for p in self.priced}
        return [pair for pair in listed if budget.scope is Scope.MODEL or pair[0].module in adapted]

    def _listed(self, sequence_length: int) -> list[tuple[Product, tuple[Factor, Factor]]]:
        shape, head = _shape(self.base)
        spec = MethodSpec(
            Method.BAYESIAN_LORA,
            rank=max(p.rank for p in self.priced),
            targets="|".join(re.escape(p.name) for p in self.priced if not p.is_head),
        )
        options = CountOptions(
            query_len=sequence_length,
            key_len=sequence_length,
            source_len=sequence_length if shape.two_stacks else None,
            adapters="unmerged",
            head="all" if head is Head.LANGUAGE_MODEL else "out",
        )
        quantizers = [(p, site) for p in self.priced for site in p.layer.effective_sites(p.adapter)]
        readings = [products(shape, options, code) for code in _codes(spec, quantizers)]
        decoded = []
        for product, *copies in zip(*readings, strict=True):
            same = (product, *copies)
            left = self._decoded([p.bits_left for p in same], quantizers)
            right = self._decoded([p.bits_right for p in same], quantizers)
            decoded.append((product, (left, right)))
        return decoded

    def _decoded(self, digits: list[int], quantizers: Sequence[tuple[Priced, Site]]) -> Factor:
        if FLOAT in digits:
            return FLOAT, None
        index = sum(CODED_WIDTHS.index(digit) * len(CODED_WIDTHS) ** place for place, digit in enumerate(digits))
        return self._width(*quantizers[index])


def _product(macs: int, left: Factor, right: Factor) -> Term:
    return macs * left[0] * right[0], left[1], right[1], None


def _codes(spec: MethodSpec, quantizers: Sequence[tuple[Priced, Site]]) -> Iterator[MethodSpec]:
    """Methods in which each quantizer has widths that spell its number, one digit each.

    Which quantizer reaches which product is the accounting room's knowledge: it is asked, not repeated.
    """
    base, places = len(CODED_WIDTHS), 1
    while base**places < len(quantizers):
        places += 1
    for place in range(places):
        widths: dict[str, dict[str, int]] = {}
        for index, (priced, site) in enumerate(quantizers):
            widths.setdefault(priced.name, {})[site.value] = CODED_WIDTHS[index // base**place % base]
        yield replace(spec, widths=widths, sites=tuple(site.value for site in Site))


def _priced(base: nn.Module) -> Iterator[Priced]:
    for name, layer in gated_layers(base):
        for adapter in layer.active_adapters:
            if not isinstance(layer, BayesianLoraLinear) or adapter in layer.bayesian_lora_down:
                yield Priced(base_key(name, adapter), layer, adapter)


def _weights(priced: Priced) -> list[tuple[Site, int]]:
    """What a layer stores: numbers of its weight, and of A, E and B for each rank."""
    weights = [(Site.WEIGHT, priced.base_macs)]
    if priced.merged:
        return weights
    layer = priced.layer
    return [*weights, (Site.DOWN, layer.in_features), (Site.DIAGONAL, 1), (Site.UP, layer.out_features)]


def _scale_bytes(priced: Priced, site: Site) -> int:
    """Bytes of the scales that are stored beside the codes of a weight."""
    if site is Site.WEIGHT and _kept_width(priced) is not None:
        return scale_count(cast(BayesianLoraLinear, priced.layer).get_base_layer()) * SCALE_BYTES
    quantizer: Any = priced.layer.quantizer_of(priced.adapter, site)
    return 0 if quantizer is None else scale_bytes(quantizer.range_count, quantizer.layout.scale_bits)


def _kept_width(priced: Priced) -> int | None:
    """Width of a weight that keeps the grid that the base was loaded with; None for one of floats."""
    if not isinstance(priced.layer, BayesianLoraLinear):
        return None
    return opaque_weight_bits(priced.layer.get_base_layer())


def _base_of(model: nn.Module) -> nn.Module:
    find = getattr(model, "get_base_model", None)
    return cast(nn.Module, find()) if callable(find) else model


def _shape(base: nn.Module) -> tuple[ModelShape, Head]:
    """The shape that the config of a model describes, with the head that its class has.

    Raises:
        ModelError: there is no config, or no formula knows it.
    """
    config: Any = getattr(base, "config", None)
    kind = type(base).__name__
    if config is None or not hasattr(config, "to_dict"):
        raise ModelError(f"{kind} has no config")
    head = Head.NONE
    if kind.endswith("ForSequenceClassification"):
        head = Head.CLASSIFICATION
    elif kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        head = Head.LANGUAGE_MODEL
    return read_shape(config.to_dict(), name=kind, head=head, num_labels=max(int(config.num_labels), 1)), head
