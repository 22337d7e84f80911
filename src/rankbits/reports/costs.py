"""What is said of costs: lines and tables in which no percentage stands without its reference and its conditions.

Everything is worked out of `CostRecord` when it is printed. Bit operations are MACs times the widths of both operands
(van Baalen et al. 2020); percentages are of the merged base model, and are put beside each other only if that is the
same model under the same options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rankbits.records import CostRecord, CountOptions, Product
from rankbits.records.costs import EXECUTED_BITS, INTEGER_KERNELS, REFERENCES, ReferenceBits

NOT_COUNTED = "not counted"
_PREFIXES = ("", " K", " M", " G", " T", " P", " E", " Z", " Y")
# Adapters and kernels are what runs differ in; all else has to be alike for a percentage to mean the same.
_MAY_DIFFER = frozenset({"adapters", "float_bits", "int4", "embeddings"})


@dataclass(frozen=True)
class Part:
    """The products that share a name: how many, and their sums."""

    name: str
    products: int
    macs: int
    bops: int
    executable_bops: int
    integer_macs: int


@dataclass(frozen=True)
class CostComparison:
    """Runs beside each other: cells of text, and below them the conditions, without which the cells mean nothing."""

    columns: tuple[str, ...]
    rows: list[list[str]]
    notes: list[str]


def cost_lines(costs: CostRecord) -> list[str]:
    """All that is to be said of one forward pass: totals, shares of the reference, and what was counted and how."""
    lines = [
        f"MACs: {costs.macs:,}; the reference, the merged base model: {costs.reference_macs:,}.",
        f"Nominal BOPs: {costs.bops:,}, {_percents(costs, executable=False)}.",
        f"Executable BOPs: {costs.executable_bops:,}, {_percents(costs, executable=True)}.",
        f"An integer kernel can execute {costs.integer_share:.1%} of the MACs.",
        f"Counted: {options_text(costs.options)}.",
        f"Products counted: {products_text(costs)}.",
    ]
    if costs.adapter_share:
        lines.insert(1, f"Adapters beside the base model make {costs.adapter_share:.2%} of the MACs.")
    if costs.elements:
        lines.append(f"Besides, in no product: {costs.element_operations:,} element operations.")
    if costs.weights:
        lines.append(f"Weights: {costs.weight_bytes:,} bytes at their nominal widths, if packed{_mean_bits(costs)}.")
    return lines


def compare_costs(runs: Mapping[str, CostRecord | None]) -> CostComparison:
    """Costs of several runs as a table. Without a shared reference it has no percentages, and a note says why.

    Args:
        runs: costs under the name that each run is shown by; None where nothing was counted.
    """
    counted = {name: costs for name, costs in runs.items() if costs is not None}
    shared = shares_reference(counted.values())
    percents = ("nominal, % of 16 / 32-bit base", "executable, % of 16 / 32-bit base") if shared and counted else ()
    columns = ("run", "MACs", "nominal BOPs", "executable BOPs", *percents, "integer MACs")
    rows = [[name, *_cells(costs, len(columns) - 1, shared=shared)] for name, costs in runs.items()]
    return CostComparison(columns, rows, comparison_notes(counted) if counted else [])


def comparison_notes(runs: Mapping[str, CostRecord]) -> list[str]:
    """The conditions of costs that stand beside each other: reference, options, products. Said once where alike."""
    costs = next(iter(runs.values()))
    if shares_reference(runs.values()):
        widths = " and ".join(f"{costs.reference_bops(bits):,} BOPs at {bits} × {bits} bits" for bits in REFERENCES)
        first = f"All percentages are of one base, the merged base model: {costs.reference_macs:,} MACs, {widths}."
    else:
        first = "No percentages: the runs have no common reference, so only absolute numbers can be compared."
        each = {name: f"{c.reference_macs:,} MACs" for name, c in runs.items()}
        first += " " + " ".join(_grouped("The merged base model", each))
    return [
        first,
        *_grouped("Counted", {name: options_text(c.options) for name, c in runs.items()}),
        *_grouped("Products counted", {name: products_text(c) for name, c in runs.items()}),
    ]


def shares_reference(costs: Iterable[CostRecord]) -> bool:
    """Whether percentages may stand beside each other: one base model, counted under the same options."""
    return len({(c.reference_macs, c.options.model_dump_json(exclude=set(_MAY_DIFFER))) for c in costs}) <= 1


def options_text(options: CountOptions) -> str:
    """Under which conditions costs were counted, as a list of short phrases."""
    o = options
    lengths = f"real lengths {', '.join(map(str, o.lengths))}" if o.lengths else "padded"
    phrases = [
        f"{o.query_len} query and {o.key_len} key tokens",
        *([f"{o.source_len} source tokens"] if o.source_len is not None else []),
        f"batch {o.batch}",
        lengths,
        f"{o.causal} attention",
        f"adapters {o.adapters}",
        f"position rows {o.positions}",
        {"out": "language-model head left out"}.get(o.head, f"language-model head on {o.head} positions"),
        f"look-up tables {'counted' if o.embeddings == 'in' else 'left out'} in bytes",
        f"floats run in {o.float_bits} bits",
        "with an int4 kernel" if o.int4 else "no int4 kernel",
    ]
    return ", ".join(phrases)


def products_text(costs: CostRecord) -> str:
    """How many products of each kind were counted: "linear 36, scores 6"."""
    return ", ".join(f"{op} {number}" for op, number in costs.counted().items()) or "none"


def breakdown(costs: CostRecord, key: Callable[[Product], str]) -> list[Part]:
    """Sums over the products that `key` gives one name, most MACs first."""
    groups: dict[str, list[Product]] = {}
    for product in costs.products:
        groups.setdefault(key(product), []).append(product)
    parts = [_part(name, products, costs.options) for name, products in groups.items()]
    return sorted(parts, key=lambda part: -part.macs)


def module_kind(product: Product) -> str:
    """The module of a product without the stack and number of its layer: "attention.self.query"."""
    names = product.module.split(".")
    after = max((index + 1 for index, name in enumerate(names) if name.isdigit()), default=0)
    return ".".join(names[after:]) or product.module


def si(number: float) -> str:
    """A count in four digits with a prefix: 1,428,381,696 is "1.428 G"."""
    if abs(number) < 1000:
        return f"{number:g}"
    power = min(int(math.log10(abs(number)) / 3), len(_PREFIXES) - 1)
    # 999,960 has to become 1.000 M and not 1000 K.
    if round(number / 1000**power, 4 - len(str(int(abs(number) / 1000**power)))) >= 1000:
        power += 1
    scaled = number / 1000**power
    return f"{scaled:.{4 - len(str(int(round(scaled, 3))))}f}{_PREFIXES[power]}"


def percent_text(value: float) -> str:
    """A percentage with two digits; a base model without products has none."""
    return "no reference" if math.isnan(value) else f"{value:.2f} %"


def _percents(costs: CostRecord, *, executable: bool) -> str:
    if not costs.reference_macs:
        return "of no reference: the base model has no products"
    shares = [
        f"{percent_text(costs.percent(bits, executable=executable))} of the reference at {bits} × {bits} bits"
        for bits in REFERENCES
    ]
    return " and ".join(shares)


def _cells(costs: CostRecord | None, number: int, *, shared: bool) -> list[str]:
    if costs is None:
        return [NOT_COUNTED, *[""] * (number - 1)]
    percents = [_pair(costs, executable=executable) for executable in (False, True)] if shared else []
    absolute = [si(costs.macs), si(costs.bops), si(costs.executable_bops)]
    return [*absolute, *percents, f"{costs.integer_share:.1%}"]


def _pair(costs: CostRecord, *, executable: bool) -> str:
    references: tuple[ReferenceBits, ...] = REFERENCES
    shares = [costs.percent(bits, executable=executable) for bits in references]
    return "no reference" if math.isnan(shares[0]) else " / ".join(f"{share:.2f}" for share in shares)


def _grouped(what: str, texts: Mapping[str, str]) -> list[str]:
    """One sentence if all texts are alike, else one for each text with the names it holds for."""
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    if len(names) == 1:
        return [f"{what}: {next(iter(names))}."]
    return [f"{what} for {'; '.join(held)}: {text}." for text, held in names.items()]


def _part(name: str, products: list[Product], options: CountOptions) -> Part:
    executed = [product.executed(options) for product in products]
    return Part(
        name=name,
        products=len(products),
        macs=sum(product.macs for product in products),
        bops=sum(product.bops for product in products),
        executable_bops=sum(p.macs * EXECUTED_BITS[kernel] ** 2 for p, kernel in zip(products, executed, strict=True)),
        integer_macs=sum(p.macs for p, kernel in zip(products, executed, strict=True) if kernel in INTEGER_KERNELS),
    )


def _mean_bits(costs: CostRecord) -> str:
    """Two means, because one alone is ambiguous: memory counts numbers, compute counts products."""
    by_parameters, by_macs = costs.mean_bits_by_parameters(), costs.mean_weight_bits_by_macs()
    if by_parameters is None or by_macs is None:
        return ""
    return f"; mean width {by_parameters:.2f} bits by numbers, {by_macs:.2f} bits by MACs"
