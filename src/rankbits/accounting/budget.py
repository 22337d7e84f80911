"""A budget in words of cost: what it allows, what is reachable, and which mean width or rank would meet it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from math import isfinite
from typing import Any

from rankbits.accounting.macs import products
from rankbits.accounting.params import quantized_heads, targeted
from rankbits.accounting.quantizers import HEAD_SITES, ranges
from rankbits.accounting.spec import Linear, MethodSpec, ModelShape
from rankbits.errors import RecipeError
from rankbits.records import CountOptions
from rankbits.records.costs import REFERENCES, ReferenceBits, scale_bytes

WIDTHS = (2, 4, 8, 16, 32)


class Quantity(str, Enum):
    """What a budget limits."""

    BOPS = "bops"
    """Bit operations, as a share of the merged base's at the reference width."""
    BYTES = "bytes"
    """Bytes of the adapted layers' weights, as a share of the base's at the reference width."""
    BITS = "bits"
    """Mean bits of the adapted layers' weights."""
    RANK = "rank"
    """Mean rank of the updates."""


class Scope(str, Enum):
    """Which products a budget on bit operations counts."""

    ADAPTED = "adapted"
    """Those of the adapted linear layers."""
    MODEL = "model"
    """Those of the whole model, with the products of attention."""


@dataclass(frozen=True)
class Budget:
    """At most `limit` of a quantity, at the gates of inference.

    Args:
        quantity: what is limited: "bops", "bytes", "bits" or "rank".
        limit: above 0. A share of the merged base model at the reference width for bit operations and bytes; bits per
            weight; mean rank of a layer.
        reference_bits: 16 or 32, the width of weights and activations of the base model that shares refer to.
        sequence_length: tokens per sequence that bit operations are counted at; needed for the scope "model".
        scope: what bit operations are counted of: "adapted" linear layers, or the whole "model".

    Raises:
        RecipeError: the quantity or the scope is unknown, a number is out of its range, the whole model is meant
            without a sequence length, or for another quantity than bit operations. All problems together.
    """

    quantity: Quantity
    limit: float
    reference_bits: ReferenceBits = 16
    sequence_length: int | None = None
    scope: Scope = Scope.ADAPTED

    def __post_init__(self) -> None:
        problems = [*self._unknown_names(), *self._bad_numbers()]
        if problems:
            raise RecipeError("budget: " + "; ".join(problems))
        object.__setattr__(self, "quantity", Quantity(self.quantity))
        object.__setattr__(self, "scope", Scope(self.scope))
        if self.scope is Scope.MODEL and self.quantity is not Quantity.BOPS:
            raise RecipeError(
                f"budget: scope 'model' counts bit operations, given with {self.quantity.value}; expected 'adapted'"
            )
        if self.scope is Scope.MODEL and self.sequence_length is None:
            raise RecipeError(
                "budget: scope 'model' needs a sequence_length, for the products of attention grow with its square; "
                "given none"
            )

    def _unknown_names(self) -> list[str]:
        problems = []
        quantities = [quantity.value for quantity in Quantity]
        scopes = [scope.value for scope in Scope]
        if self.quantity not in quantities:
            problems.append(f"quantity: given {self.quantity!r}, expected one of {', '.join(quantities)}")
        if self.scope not in scopes:
            problems.append(f"scope: given {self.scope!r}, expected one of {', '.join(scopes)}")
        return problems

    def _bad_numbers(self) -> list[str]:
        problems = []
        limit: Any = self.limit
        if not isinstance(limit, (int, float)) or not isfinite(limit) or limit <= 0:
            problems.append(f"limit: given {limit!r}, expected a number above 0")
        if self.reference_bits not in REFERENCES:
            problems.append(f"the reference is 16 or 32 bits wide, given {self.reference_bits!r}")
        length: Any = self.sequence_length
        if length is not None and (not isinstance(length, int) or length < 1):
            problems.append(f"sequence_length: given {length!r}, expected a whole number of at least 1")
        return problems

    def __str__(self) -> str:
        """The text form, such as "bops=0.25"."""
        return f"{self.quantity.value}={self.limit:g}"


@dataclass(frozen=True)
class Expectation:
    """What a budget means for a model.

    Args:
        low: the least that is reachable: 2 bits and rank 1 everywhere.
        high: what costs with every gate open.
        mean_bits: mean width that meets the budget if all quantizers share it; None if bits are not learned.
        mean_rank: mean rank that meets the budget.
    """

    low: float
    high: float
    mean_bits: float | None
    mean_rank: float


def parse_budget(
    text: str, reference_bits: int = 16, *, sequence_length: int | None = None, scope: str = "adapted"
) -> Budget:
    """The budget that a text such as "bops=0.5", "bytes=0.3", "bits=4.0" or "rank=2.5" names.

    Args:
        text: a quantity, "=" and a number above 0.
        reference_bits: as in `Budget`.
        sequence_length: as in `Budget`; it is about bit operations and means nothing to other quantities.
        scope: as in `Budget`; likewise.

    Raises:
        RecipeError: the text is not of that form, or what `Budget` raises.
    """
    name, _, number = text.partition("=")
    names = [quantity.value for quantity in Quantity]
    try:
        limit = float(number)
    except ValueError:
        limit = 0.0
    if name not in names or not isfinite(limit) or limit <= 0:
        raise RecipeError(
            f"budget: given {text!r}, expected one of {', '.join(names)}, '=' and a number above 0, such as bits=4"
        )
    reference: Any = reference_bits
    if name != Quantity.BOPS.value:
        return Budget(Quantity(name), limit, reference)
    chosen: Any = scope
    return Budget(Quantity(name), limit, reference, sequence_length, chosen)


def expectation(shape: ModelShape, spec: MethodSpec, options: CountOptions, budget: Budget) -> Expectation:
    """The reachable interval, and the mean width and rank that meet the budget.

    A budget on bits, bytes or bit operations is met with one width for all quantizers at full rank; between two widths
    some tensors take the one and some the other, so that cost is linear in the share of each.

    Args:
        shape: the model.
        spec: the method, with the sites of its quantizers and its maximum rank.
        options: lengths that a budget on bit operations refers to.
        budget: what is allowed.

    Raises:
        RecipeError: the budget is out of reach, with what can be reached; or the method has no quantizers or no learned
            ranks to meet it.
    """
    if budget.quantity is Quantity.RANK:
        if not spec.learn_rank or spec.rank < 2:
            raise RecipeError(
                f"budget {budget} cannot be met: no rank has a gate; expected learn_rank=True and r of at least 2"
            )
        _check(budget, 1.0, float(spec.rank), floor="rank 1")
        return Expectation(1.0, float(spec.rank), None, min(budget.limit, float(spec.rank)))
    if not spec.sites:
        raise RecipeError(
            f"budget {budget.quantity.value}={budget.limit:g}: {spec.method.value} has no quantizers, so no widths "
            "that could meet it"
        )
    measure = _measure(shape, options, budget)
    costs = [measure(_uniform(shape, spec, width)) for width in WIDTHS]
    # A mean over weights can rise when a layer gives up narrow ones.
    low = min(costs[0], measure(_uniform(shape, _at_rank(spec, 1), WIDTHS[0]))) if spec.learn_rank else costs[0]
    reads_floats = "input" not in spec.sites and not quantized_heads(shape, spec)
    _check(budget, low, costs[-1], floor="2 bits and rank 1", reads_floats=reads_floats)
    return Expectation(low, costs[-1], *_mixture(shape, spec, costs, budget.limit, measure))


def _mixture(
    shape: ModelShape,
    spec: MethodSpec,
    costs: list[float],
    limit: float,
    measure: Callable[[MethodSpec], float],
) -> tuple[float, float]:
    """Mean bits and mean rank at which the cost is the limit: first bits are given up, then ranks."""
    if limit >= costs[-1]:
        return float(WIDTHS[-1]), float(spec.rank)
    for index in range(len(WIDTHS) - 1, 0, -1):
        below, above = costs[index - 1], costs[index]
        if limit >= below:
            share = (limit - below) / (above - below)
            return WIDTHS[index - 1] + share * (WIDTHS[index] - WIDTHS[index - 1]), float(spec.rank)
    ranks = [rank for rank in range(1, spec.rank + 1) if measure(_uniform(shape, _at_rank(spec, rank), 2)) <= limit]
    return float(WIDTHS[0]), float(max(ranks, default=1))


def _at_rank(spec: MethodSpec, rank: int) -> MethodSpec:
    return replace(spec, rank=rank, ranks={})


def _uniform(shape: ModelShape, spec: MethodSpec, width: int) -> MethodSpec:
    widths = {linear.name: dict.fromkeys(spec.sites, width) for linear in targeted(shape, spec)}
    widths |= {linear.name: dict.fromkeys(HEAD_SITES, width) for linear in quantized_heads(shape, spec)}
    return replace(spec, widths=widths)


def _measure(shape: ModelShape, options: CountOptions, budget: Budget) -> Callable[[MethodSpec], float]:
    if budget.quantity is Quantity.BOPS:
        return lambda spec: _bops_share(shape, spec, options, budget)
    if budget.quantity is Quantity.BITS:
        return lambda spec: _mean_bits(shape, spec)
    return lambda spec: _bytes_share(shape, spec, budget.reference_bits)


def _bops_share(shape: ModelShape, spec: MethodSpec, options: CountOptions, budget: Budget) -> float:
    adapted = {linear.name for linear in (*targeted(shape, spec), *quantized_heads(shape, spec))}
    form = options.model_copy(update={"adapters": "merged" if spec.rounds_sum else "unmerged"})
    listed = products(shape, form, spec)
    counted = [p for p in listed if budget.scope is Scope.MODEL or p.module in adapted]
    base = sum(product.macs for product in counted if product.adapter is None)
    return sum(product.bops for product in counted) / (base * budget.reference_bits**2)


def _tensors(shape: ModelShape, spec: MethodSpec) -> Iterator[tuple[Linear, dict[str, int]]]:
    """Numbers of each weight that is kept of an adapted layer or a quantized head, by the site of its quantizer."""
    rank = 0 if spec.rounds_sum else spec.rank
    for linear in targeted(shape, spec):
        beside = {"down": rank * linear.d_in, "diagonal": rank, "up": rank * linear.d_out} if rank else {}
        yield linear, {"weight": linear.d_in * linear.d_out} | beside
    for linear in quantized_heads(shape, spec):
        yield linear, {"weight": linear.d_in * linear.d_out}


def _mean_bits(shape: ModelShape, spec: MethodSpec) -> float:
    bits = count = 0
    for linear, sizes in _tensors(shape, spec):
        for site, size in sizes.items():
            bits += size * spec.widths[linear.name].get(site, 32)
            count += size
    return bits / count


def _bytes_share(shape: ModelShape, spec: MethodSpec, reference_bits: int) -> float:
    size_bytes = base = 0
    for linear, sizes in _tensors(shape, spec):
        base += linear.d_in * linear.d_out * reference_bits // 8
        for site, size in sizes.items():
            width = spec.widths[linear.name].get(site, 32)
            scales = ranges(linear, site, spec) if site in spec.widths[linear.name] else 0
            size_bytes += (size * width + 7) // 8 + scale_bytes(scales, spec.scale_bits if site == "weight" else 32)
    return size_bytes / base


def _check(budget: Budget, low: float, high: float, *, floor: str, reads_floats: bool = False) -> None:
    if low <= budget.limit <= high:
        return
    advice = ""
    if budget.limit < low and budget.quantity is Quantity.BOPS and reads_floats:
        advice = '. No input has a quantizer, so each counts 32 bits: add "input" to quantizers'
    raise RecipeError(
        f"budget {budget} cannot be met: with {floor} everywhere it is {low:.4g}, with all gates open {high:.4g}; "
        f"expected a limit between them{advice}"
    )
