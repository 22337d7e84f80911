"""What a page shows of one run beside its figures: numbers, parts and facts, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankbits.records import SITES, ModuleRecord, RunRecord, Site
from rankbits.reports.certainty import certainty_lines, near_gates
from rankbits.reports.costs import NOT_COUNTED, Part, breakdown, compare_costs, cost_lines, module_kind, si
from rankbits.reports.tables import (
    AS_LOADED,
    FULL_PRECISION,
    SITE_LABELS,
    bits_text,
    has_bits,
    has_learned_rank,
    rank_text,
    weight_bits_text,
)

_PARAMETER_ROWS = (
    ("adapter", "Adapter matrices"),
    ("gates", "Gates of bits and ranks"),
    ("ranges", "Ranges of quantizers"),
    ("head", "Task head"),
    ("base", "Weights of the model itself"),
    ("trainable", "All trained"),
    ("total", "Whole model"),
)
NEAR_COLUMNS = ("matrix", "decides", "probability of being open", "on above", "is")
_PART_COLUMNS = ("products", "number", "MACs", "nominal BOPs", "executable BOPs", "integer MACs")


def tiles(record: RunRecord) -> list[tuple[str, str]]:
    """The few numbers beside the headline, each with what it counts."""
    most = max((module.max_rank for module in record.modules), default=0)
    rank = f"{rank_text(record)} of {most}" if has_learned_rank(record) else rank_text(record)
    adapters = record.mean_adapter_bits()
    bits = [("bits of W0, mean", weight_bits_text(record)), ("bits of A, E, B, mean", bits_text(adapters))]
    precision = [(name, "not quantized" if text == FULL_PRECISION else text) for name, text in bits]
    return [
        ("rank, mean", rank),
        *(precision if has_bits(record) else [("precision", "full")]),
        ("trained parameters", f"{record.parameters.trainable:,}"),
        ("minutes", f"{record.training.seconds / 60:.1f}"),
    ]


def costs(record: RunRecord) -> dict[str, Any]:
    """What one forward pass costs, in sentences, with its parts as a table; says so if it was not counted."""
    if record.costs is None:
        return {"lines": [f"Costs: {NOT_COUNTED}."], "columns": (), "rows": []}
    by_op = breakdown(record.costs, lambda product: product.op)
    by_module = breakdown(record.costs, module_kind)
    rows = [[_part(part) for part in by_op], [_part(part) for part in by_module]]
    return {"lines": cost_lines(record.costs), "columns": _PART_COLUMNS, "rows": [group for group in rows if group]}


def shared_costs(runs: Mapping[str, RunRecord]) -> dict[str, Any] | None:
    """Costs of several runs beside each other; None if none was counted."""
    if all(record.costs is None for record in runs.values()):
        return None
    compared = compare_costs({name: record.costs for name, record in runs.items()})
    return {"columns": compared.columns, "rows": compared.rows, "notes": compared.notes}


def parameters(record: RunRecord) -> list[tuple[str, str, str]]:
    """Name, number and share of the whole model, for each part that exists."""
    counts = record.parameters
    numbers = [(name, int(getattr(counts, field))) for field, name in _PARAMETER_ROWS]
    return [(name, f"{number:,}", _share(number, counts.total)) for name, number in numbers if number]


def modules(record: RunRecord) -> dict[str, Any]:
    """The numbers behind the figures, as one table; what the width of another matrix decides is marked with =."""
    kept = any(module.quantized_base for module in record.modules)
    used = {site for module in record.modules for site in module.bits} | ({"weight"} if kept else set())
    sites = [site for site in SITES if site in used]

    def cell(module: ModuleRecord, site: Site) -> str:
        if site == "weight" and module.quantized_base:
            return AS_LOADED
        shared = "=" if site in module.shared else ""
        return f"{module.bits[site]}{shared}" if site in module.bits else ""

    def rank(module: ModuleRecord) -> str:
        return f"{module.rank} of {module.max_rank}" if module.max_rank else "in full"

    columns = ["matrix", "rank", *(f"bits of {SITE_LABELS[site]}" for site in sites)]
    rows = [[module.name, rank(module), *(cell(module, site) for site in sites)] for module in record.modules]
    owners = sorted({owner for module in record.modules for owner in module.shared.values()})
    note = f"= the width is that of another matrix ({', '.join(owners)})." if owners else ""
    return {"columns": columns, "rows": rows, "note": note}


def certainty(record: RunRecord) -> dict[str, Any]:
    """How certain what was learned is: in sentences, and the gates near their threshold as a table."""
    return {"lines": certainty_lines(record), "columns": NEAR_COLUMNS, "rows": near_gates(record)}


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Where the numbers come from: enough to run the same work again."""
    data, training = record.data, record.training
    evaluation = ", ".join(f"{split} {rows:,}" for split, rows in data.evaluation_rows.items())
    dropped = ", ".join(f"{reason} {rows:,}" for reason, rows in data.dropped.items() if rows)
    found = [
        ("Command", record.command),
        ("Created", record.created),
        ("Seed", str(record.seed)),
        ("Recipe hash", record.recipe_hash),
        ("Data", f"{data.task} from {data.source}, evaluated on {data.split}"),
        ("Rows", f"train {data.train_rows:,}; {evaluation}"),
        ("Rows dropped", dropped or "none"),
        ("Data fingerprint", data.fingerprint),
        ("Training", f"{training.steps:,} steps, {training.epochs:g} epochs, mean loss {training.train_loss:.4g}"),
        ("Resumed", "yes" if training.resumed else "no"),
        ("Peak memory", f"{training.peak_memory_bytes / 2**30:.2f} GiB"),
    ]
    found += [("Machine: " + name, str(value)) for name, value in record.machine.items()]
    return found + [("Version: " + name, version) for name, version in record.versions.items()]


def _part(part: Part) -> list[str]:
    amounts = [si(part.macs), si(part.bops), si(part.executable_bops)]
    return [part.name, f"{part.products:,}", *amounts, f"{part.integer_macs / part.macs:.1%}"]


def _share(number: int, total: int) -> str:
    if not total:
        return ""
    return "under 0.01%" if number / total < 1e-4 else f"{number / total:.2%}"
