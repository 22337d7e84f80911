"""One self-contained page about one or several runs: no network, no script, light and dark, any width."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from rankbits.errors import RankbitsError
from rankbits.records import SITES, ModuleRecord, RunRecord, write_atomically
from rankbits.reports import figures
from rankbits.reports.extra import require_report_extra
from rankbits.reports.findings import findings
from rankbits.reports.tables import (
    COLUMNS,
    SITE_LABELS,
    bits_text,
    has_bits,
    has_learned_rank,
    labels,
    rank_text,
    run_table,
)

_PARAMETER_ROWS = (
    ("adapter", "Adapter matrices"),
    ("gates", "Gates of bits and ranks"),
    ("ranges", "Ranges of quantizers"),
    ("head", "Task head"),
    ("trainable", "All trained"),
    ("total", "Whole model"),
)


def render(records: Sequence[RunRecord], path: Path, recipe_links: Mapping[str, str]) -> None:
    """Write the page about `records` to `path`, in one step, over an older page if there is one.

    `recipe_links` gives a link relative to the page for a run's recipe file, under the run's recipe hash or its name;
    a run without one has no link. Raises RankbitsError if there is no record, if the `report` extra is not installed,
    or if a link is not relative; RunFolderError if the page cannot be written.
    """
    if not records:
        raise RankbitsError("a report needs at least one run record, given none")
    links = [_relative(recipe_links.get(r.recipe_hash, recipe_links.get(r.name))) for r in records]
    require_report_extra()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    names = labels(records)
    environment = Environment(
        loader=PackageLoader("rankbits.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        title=" and ".join(dict.fromkeys(record.name for record in records)),
        columns=COLUMNS,
        rows=run_table(records),
        runs=[_run(*parts) for parts in zip(records, names, links, strict=True)],
    )
    write_atomically(path, page)


def _run(record: RunRecord, label: str, recipe_link: str | None) -> dict[str, Any]:
    """What the template shows of one run; everything in it is text or SVG of our own making."""
    score = record.primary_score()
    return {
        "label": label,
        "name": record.name,
        "method": record.method,
        "task": record.data.task,
        "score": f"{score.value:.2f}",
        "metric": score.metric,
        "split": score.split,
        "tiles": _tiles(record),
        "findings": findings(record),
        "figures": _figures(record),
        "scores": [(s.metric, s.split, f"{s.value:.2f}") for s in record.scores],
        "parameters": _parameters(record),
        "modules": _modules(record),
        "facts": _facts(record),
        "recipe_link": recipe_link,
        "recipe": json.dumps(record.recipe, indent=2, ensure_ascii=False),
        "base": str(record.recipe.get("model", "the base model")),
    }


def _relative(link: str | None) -> str | None:
    """The link with unsafe characters quoted. Anything but a relative path could call the network or run a script."""
    if link is None:
        return None
    if urlsplit(link).scheme or link.startswith(("/", "\\")):
        raise RankbitsError(f"a recipe link must be relative to the page, given {link!r}")
    return quote(link)


def _tiles(record: RunRecord) -> list[tuple[str, str]]:
    """The few numbers beside the headline, each with what it counts."""
    most = max((module.max_rank for module in record.modules), default=0)
    rank = f"{rank_text(record)} of {most}" if has_learned_rank(record) else rank_text(record)
    bits = [("bits of W0, mean", record.mean_bits("weight")), ("bits of A, E, B, mean", record.mean_adapter_bits())]
    precision = [(name, "not quantized" if value is None else bits_text(value)) for name, value in bits]
    return [
        ("rank, mean", rank),
        *(precision if has_bits(record) else [("precision", "full")]),
        ("trained parameters", f"{record.parameters.trainable:,}"),
        ("minutes", f"{record.training.seconds / 60:.1f}"),
    ]


def _figures(record: RunRecord) -> list[dict[str, str]]:
    """The figures that have something to show, each with a title and how to read it."""
    drawn = []
    if has_learned_rank(record):
        drawn.append(("Rank of each matrix", "Rows are layers, columns kinds of matrix.", figures.rank_heatmap))
    if has_bits(record):
        drawn += [
            (
                "Bits, by quantizer",
                "A dot is one matrix; box: quartiles and median; diamond and number on top: mean.",
                figures.bits_box,
            ),
            (
                "Bits of each quantizer",
                "Rows are matrices, columns the tensors that are quantized.",
                figures.bits_heatmap,
            ),
        ]
    if figures.has_curves(record):
        drawn.append(("During training", "As logged, over optimizer steps.", figures.training_curves))
    return [{"title": title, "reading": reading, "svg": draw(record)} for title, reading, draw in drawn]


def _parameters(record: RunRecord) -> list[tuple[str, str, str]]:
    """Name, number and share of the whole model, for each part that exists."""
    counts = record.parameters
    numbers = [(name, int(getattr(counts, field))) for field, name in _PARAMETER_ROWS]
    return [(name, f"{number:,}", _share(number, counts.total)) for name, number in numbers if number]


def _share(number: int, total: int) -> str:
    if not total:
        return ""
    return "under 0.01%" if number / total < 1e-4 else f"{number / total:.2%}"


def _modules(record: RunRecord) -> dict[str, Any]:
    """The numbers behind the figures, as one table."""
    sites = [site for site in SITES if any(site in module.bits for module in record.modules)]

    def row(module: ModuleRecord) -> list[str]:
        bits = [str(module.bits[site]) if site in module.bits else "" for site in sites]
        return [module.name, f"{module.rank} of {module.max_rank}", *bits]

    columns = ["matrix", "rank", *(f"bits of {SITE_LABELS[site]}" for site in sites)]
    return {"columns": columns, "rows": [row(module) for module in record.modules]}


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """Where the numbers come from: enough to run the same work again."""
    data, training = record.data, record.training
    evaluation = ", ".join(f"{split} {rows:,}" for split, rows in data.evaluation_rows.items())
    dropped = ", ".join(f"{reason} {rows:,}" for reason, rows in data.dropped.items() if rows)
    facts = [
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
    facts += [("Machine: " + name, str(value)) for name, value in record.machine.items()]
    return facts + [("Version: " + name, version) for name, version in record.versions.items()]
