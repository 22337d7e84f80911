"""A budget in words of cost: what it allows, what is reachable, and which mean width or rank would meet it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from math import isfinite

from rankbits.accounting.macs import products
from rankbits.accounting.params import targeted
from rankbits.accounting.spec import Linear, MethodSpec, ModelShape
from rankbits.errors import RecipeError
from rankbits.records import CountOptions
from rankbits.records.costs import REFERENCES, SCALE_BYTES, ReferenceBits

WIDTHS = (2, 4, 8, 16, 32)
_WEIGHT_SITES = ("weight", "down", "diagonal", "up")


class Quantity(str, Enum):
    """What a budget limits."""

    BOPS = "bops"
    """Bit operations of the adapted layers, as a share of the merged base's at the reference width."""
    BYTES = "bytes"
    """Bytes of the adapted layers' weights, as a share of the base's at the reference width."""
    BITS = "bits"
    """Mean bits of the adapted layers' weights."""
    RANK = "rank"
    """Mean rank of the updates."""


@dataclass(frozen=True)
class Budget:
    """At most `limit` of a quantity. Shares refer to the merged base model `reference_bits` wide."""

    quantity: Quantity
    limit: float
    reference_bits: ReferenceBits = 16


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


def parse_budget(text: str, reference_bits: int = 16) -> Budget:
    """The budget that a text such as "bops=0.5", "bytes=0.3", "bits=4.0" or "rank=2.5" names.

    Raises RecipeError for another quantity, a limit that is not a positive number, or another reference than 16 or 32.
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
    matching = [reference for reference in REFERENCES if reference == reference_bits]
    if not matching:
        raise RecipeError(f"budget: the reference is 16 or 32 bits wide, given {reference_bits}")
    return Budget(Quantity(name), limit, matching[0])


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
        RecipeError: the budget is out of reach, with what can be reached; or the method has no quantizers to meet it.
    """
    if budget.quantity is Quantity.RANK:
        _check(budget, 1.0, float(spec.rank), floor="rank 1")
        return Expectation(1.0, float(spec.rank), None, min(budget.limit, float(spec.rank)))
    if not spec.sites:
        raise RecipeError(
            f"budget {budget.quantity.value}={budget.limit:g}: {spec.method.value} has no quantizers, so no widths "
            "that could meet it"
        )
    measure = _measure(shape, options, budget)
    low = measure(_uniform(shape, replace(spec, rank=1), WIDTHS[0]))
    costs = [measure(_uniform(shape, spec, width)) for width in WIDTHS]
    _check(budget, low, costs[-1], floor="2 bits and rank 1")
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
    return replace(spec, widths={linear.name: dict.fromkeys(spec.sites, width) for linear in targeted(shape, spec)})


def _measure(shape: ModelShape, options: CountOptions, budget: Budget) -> Callable[[MethodSpec], float]:
    if budget.quantity is Quantity.BOPS:
        return lambda spec: _bops_share(shape, spec, options, budget.reference_bits)
    if budget.quantity is Quantity.BITS:
        return lambda spec: _mean_bits(shape, spec)
    return lambda spec: _bytes_share(shape, spec, budget.reference_bits)


def _bops_share(shape: ModelShape, spec: MethodSpec, options: CountOptions, reference_bits: int) -> float:
    adapted = {linear.name for linear in targeted(shape, spec)}
    beside = options.model_copy(update={"adapters": "unmerged"})
    counted = [product for product in products(shape, beside, spec) if product.module in adapted]
    base = sum(product.macs for product in counted if product.adapter is None)
    return sum(product.bops for product in counted) / (base * reference_bits**2)


def _tensors(linear: Linear, spec: MethodSpec) -> dict[str, int]:
    """Numbers of each weight of an adapted layer, by the site of its quantizer."""
    rank = spec.rank
    sizes = (linear.d_in * linear.d_out, rank * linear.d_in, rank, rank * linear.d_out)
    return dict(zip(_WEIGHT_SITES, sizes, strict=True))


def _mean_bits(shape: ModelShape, spec: MethodSpec) -> float:
    bits = count = 0
    for linear in targeted(shape, spec):
        for site, size in _tensors(linear, spec).items():
            bits += size * spec.widths[linear.name].get(site, 32)
            count += size
    return bits / count


def _bytes_share(shape: ModelShape, spec: MethodSpec, reference_bits: int) -> float:
    size_bytes = base = 0
    for linear in targeted(shape, spec):
        base += linear.d_in * linear.d_out * reference_bits // 8
        for site, size in _tensors(linear, spec).items():
            width = spec.widths[linear.name].get(site, 32)
            size_bytes += (size * width + 7) // 8 + (SCALE_BYTES if site in spec.sites else 0)
    return size_bytes / base


def _check(budget: Budget, low: float, high: float, *, floor: str) -> None:
    if budget.limit < low:
        raise RecipeError(
            f"budget {budget.quantity.value}={budget.limit:g} cannot be met: with {floor} everywhere it is {low:.4g}, "
            f"with all gates open {high:.4g}; expected a limit between them"
        )
