"""What a record shows, in plain sentences: the outcome that the figures illustrate."""

from __future__ import annotations

from collections import Counter

from rankbits.records import SITES, BudgetRecord, CostRecord, RunRecord
from rankbits.reports.costs import si
from rankbits.reports.tables import SITE_LABELS, has_bits, has_learned_rank

_SHARES = frozenset({"bops", "bytes"})
_UNITS = {
    "bops": "of the bit operations of the merged base",
    "bytes": "of the weight bytes of the merged base",
    "bits": "bits a weight on average",
    "rank": "ranks a matrix on average",
}


def findings(record: RunRecord) -> list[str]:
    """A sentence about ranks, one about bits, one for each budget and, where they were counted, one about costs.

    They say so where nothing was learned or nothing moved.
    """
    costs = [_cost_sentence(record.costs)] if record.costs is not None else []
    return [_rank_sentence(record), _bits_sentence(record), *map(budget_sentence, record.budgets), *costs]


def budget_sentence(budget: BudgetRecord) -> str:
    """What was allowed and what was reached, in the unit of the budget: shares in percent."""
    allowed, reached = (_amount(budget, value) for value in (budget.limit, budget.reached))
    verdict = "" if budget.is_met else ": more than allowed"
    return f"Budget {budget.text}: {reached} of at most {allowed} {_UNITS[budget.quantity]}{_base(budget)}{verdict}."


def _amount(budget: BudgetRecord, value: float) -> str:
    return f"{value:.2%}" if budget.quantity in _SHARES else f"{value:.3f}"


def _base(budget: BudgetRecord) -> str:
    return f" at {budget.reference_bits} bits" if budget.quantity in _SHARES else ""


def _rank_sentence(record: RunRecord) -> str:
    modules = record.adapted()
    if not modules:
        return "No matrix was adapted."
    low, high = min(m.rank for m in modules), max(m.rank for m in modules)
    if not has_learned_rank(record):
        at = f"rank {low}" if low == high else f"ranks from {low} to {high}"
        return f"The rank is fixed: all {len(modules)} matrices were adapted at {at}."
    if all(m.rank == m.max_rank for m in modules):
        return f"No rank was closed: all {len(modules)} matrices keep their full rank."
    if low == high:
        return f"All {len(modules)} matrices ended at the same rank, {low}."
    lowest = next(m.name for m in modules if m.rank == low)
    highest = next(m.name for m in modules if m.rank == high)
    return f"Ranks differ between matrices, from {low} ({lowest}) to {high} ({highest})."


def _bits_sentence(record: RunRecord) -> str:
    if not has_bits(record):
        return "Nothing was quantized: every tensor stays in full precision."
    counts = Counter(bits for m in record.modules for bits in m.own_bits().values())
    total = counts.total()
    if len(counts) == 1:
        return f"All {total} quantizers ended at the same width, {next(iter(counts))} bits."
    shares = ", ".join(f"{counts[bits]} at {bits} bits" for bits in sorted(counts))
    means = {SITE_LABELS[site]: mean for site in SITES if (mean := record.mean_bits(site)) is not None}
    narrow, wide = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    sentence = f"Of {total} quantizers, {shares}"
    if means[narrow] == means[wide]:
        return f"{sentence}."
    return f"{sentence}; narrowest on average is {narrow} ({means[narrow]:.1f}), widest {wide} ({means[wide]:.1f})."


def _cost_sentence(costs: CostRecord) -> str:
    """Shares of MACs only: a percentage of bit operations needs its reference, which the costs below it have."""
    o = costs.options
    work = f"One forward pass of {o.query_len} tokens, batch {o.batch}, adapters {o.adapters}, is {si(costs.macs)} MACs"
    if not costs.integer_share:
        return f"{work}, none of which an integer kernel can execute."
    return f"{work}, of which an integer kernel can execute {costs.integer_share:.1%}."
