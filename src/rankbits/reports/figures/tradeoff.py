"""Score against cost, a point for each run: against bit operations, and against the bytes of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from rankbits.records import CostRecord
from rankbits.records.costs import REFERENCES
from rankbits.records.metrics import lower_is_better, unit
from rankbits.reports.costs import breakdown, comparison_notes, shares_reference, si
from rankbits.reports.figures.figure import Cell, Figure, Runs
from rankbits.reports.figures.legend import marked
from rankbits.reports.figures.scatter import Panel, Point, draw_panels
from rankbits.reports.tables import labels

BOPS_COLUMNS = (
    "run", "task", "metric", "split", "score", "query_len", "key_len", "source_len", "batch", "adapters", "positions",
    "head", "causal", "lengths", "float_bits", "int4", "macs", "integer_macs", "bops_nominal", "bops_executable",
    "reference_macs", "reference_bops_16", "reference_bops_32",
)  # fmt: skip
BYTES_COLUMNS = ("run", "task", "metric", "split", "score", "weight_bytes", "embeddings")


def score_by_bops(runs: Runs) -> Figure | None:
    """Score against bit operations; in percent only if all runs share one reference. None with fewer than two runs."""
    counted = _with_costs(runs, lambda costs: costs.macs > 0 and costs.reference_macs > 0)
    if len(counted) < 2:
        return None
    shared = shares_reference(counted.values())
    places: dict[str, tuple[float, float | None]] = {
        name: (c.percent(16, executable=True), c.percent(16)) if shared else (c.executable_bops, c.bops)
        for name, c in counted.items()
    }
    unit = "BOPs, % of the base at 16 bits" if shared else "BOPs"
    scale = (
        "in percent of one shared reference, the merged base model with operands of 16 bits; of 32 bits: a quarter"
        if shared
        else "as absolute numbers, because the runs have no common reference"
    )
    shares = [costs.integer_share for costs in counted.values()]
    between = f"between {min(shares):.1%} and {max(shares):.1%}" if min(shares) < max(shares) else f"{shares[0]:.1%}"
    notes = ["Filled: executable bits. Hollow: nominal bits.", *comparison_notes(counted)]
    notes.append(f"Integer kernels can execute {between} of the MACs.")
    return Figure(
        name="score-by-bops",
        title="Score against bit operations",
        reading=f"Filled: executable bits; hollow: nominal bits. Bit operations stand {scale}. Up and left is better.",
        label=f"Scores of {len(counted)} runs against their bit operations, {scale}.",
        columns=BOPS_COLUMNS,
        rows=[_bops_row(runs, name, costs) for name, costs in counted.items()],
        draw=partial(draw_panels, _panels(runs, places), unit, "{:g} %".format if shared else _short, notes),
    )


def score_by_bytes(runs: Runs) -> Figure | None:
    """Score against the bytes of all weights. None with fewer than two runs that list their weights."""
    counted = _with_costs(runs, lambda costs: costs.weight_bytes > 0)
    if len(counted) < 2:
        return None
    counts_tables = {name: costs.options.embeddings == "in" for name, costs in counted.items()}
    if len(set(counts_tables.values())) == 1:
        tables = f"Look-up tables are {'counted' if all(counts_tables.values()) else 'left out'}."
    else:
        names = "; ".join(name for name, counts in counts_tables.items() if counts)
        tables = f"Not all alike: look-up tables are counted only for {names}."
    places: dict[str, tuple[float, float | None]] = {name: (c.weight_bytes, None) for name, c in counted.items()}
    return Figure(
        name="score-by-bytes",
        title="Score against bytes",
        reading=f"Bytes of all weights at their nominal widths with their scales, as an export that packs them would "
        f"store them. {tables} Up and left is better.",
        label=f"Scores of {len(counted)} runs against the bytes of their weights.",
        columns=BYTES_COLUMNS,
        rows=[
            (name, *_score(runs, name), costs.weight_bytes, costs.options.embeddings) for name, costs in counted.items()
        ],
        draw=partial(draw_panels, _panels(runs, places), "bytes of weights", _bytes, [tables]),
    )


def _with_costs(runs: Runs, usable: Callable[[CostRecord], bool]) -> dict[str, CostRecord]:
    found = {name: record.costs for name, record in runs.items()}
    return {name: costs for name, costs in found.items() if costs is not None and usable(costs)}


def _panels(runs: Runs, places: Mapping[str, tuple[float, float | None]]) -> list[Panel]:
    """A panel for each task, metric and split: other scores cannot be compared. A method looks the same in all."""
    names: dict[tuple[str, str, str], list[str]] = {}
    for name in places:
        task, metric, split, _ = _score(runs, name)
        names.setdefault((task, metric, split), []).append(name)
    keys = {key.name: key for key in marked(dict.fromkeys(runs[name].method for name in places))}
    panels = []
    for (task, metric, split), held in names.items():
        records = [runs[name] for name in held]
        points = [
            Point(label, record.primary_score().value, *places[name], key=keys[record.method])
            for name, label, record in zip(held, labels(records), records, strict=True)
        ]
        less = ", less is better" if lower_is_better(metric) else ""
        measured = "%" if unit(metric) == "percent" else unit(metric)
        panels.append(Panel(f"{task}, {split}", f"{metric}, {measured}{less}", points))
    return panels


def _score(runs: Runs, name: str) -> tuple[str, str, str, float]:
    score = runs[name].primary_score()
    return runs[name].data.task, score.metric, score.split, score.value


def _bops_row(runs: Runs, name: str, costs: CostRecord) -> tuple[Cell, ...]:
    o = costs.options
    integer_macs = sum(part.integer_macs for part in breakdown(costs, lambda product: product.op))
    lengths = " ".join(map(str, o.lengths or []))
    counted = (o.query_len, o.key_len, o.source_len, o.batch, o.adapters, o.positions, o.head)
    conditions = (*counted, o.causal, lengths, o.float_bits, int(o.int4))
    totals = (costs.macs, integer_macs, costs.bops, costs.executable_bops, costs.reference_macs)
    return (name, *_score(runs, name), *conditions, *totals, *(costs.reference_bops(bits) for bits in REFERENCES))


def _short(number: float) -> str:
    """A round number on an axis: 2e12 is "2 T"."""
    text = si(number)
    digits, _, prefix = text.partition(" ")
    return f"{float(digits):g} {prefix}".rstrip()


def _bytes(number: float) -> str:
    return f"{_short(number)}B" if number >= 1000 else f"{number:g} B"
