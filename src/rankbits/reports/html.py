"""One self-contained page about one or several runs: no network, no script, light and dark, any width."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from rankbits.errors import RankbitsError
from rankbits.records import RunRecord, write_atomically
from rankbits.reports import sections
from rankbits.reports.extra import require_report_extra
from rankbits.reports.figures import Figure, report_figures
from rankbits.reports.figures.canvas import page_svg
from rankbits.reports.figures.files import SUFFIXES
from rankbits.reports.findings import findings
from rankbits.reports.tables import COLUMNS, labels, run_table


def render(
    records: Sequence[RunRecord], path: Path, recipe_links: Mapping[str, str], figure_folder: str | None = None
) -> None:
    """Write the page about `records` to `path`, in one step, over an older page if there is one.

    `recipe_links` gives a link relative to the page for a run's recipe file, under the run's recipe hash or its name;
    a run without one has no link. `figure_folder` is where the figures lie as files, relative to the page; without it
    the page does not link to them. Raises RankbitsError if there is no record, if the `report` extra is not installed,
    or if a link is not relative; RunFolderError if the page cannot be written.
    """
    if not records:
        raise RankbitsError("a report needs at least one run record, given none")
    links = [_relative(recipe_links.get(r.recipe_hash, recipe_links.get(r.name)), "recipe link") for r in records]
    folder = _relative(figure_folder, "figure folder")
    require_report_extra()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    names = labels(records)
    drawn = report_figures(records)
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
        costs=sections.shared_costs(dict(zip(names, records, strict=True))),
        figures=[_figure(figure, folder) for figure in drawn.shared],
        runs=[
            _run(record, name, link) | {"figures": [_figure(figure, folder) for figure in figures]}
            for record, name, link, figures in zip(records, names, links, drawn.own, strict=True)
        ],
    )
    write_atomically(path, page)


def _run(record: RunRecord, label: str, recipe_link: str | None) -> dict[str, Any]:
    """What the template shows of one run beside its figures; everything in it is text."""
    score = record.primary_score()
    return {
        "label": label,
        "name": record.name,
        "method": record.method,
        "task": record.data.task,
        "score": f"{score.value:.2f}",
        "metric": score.metric,
        "split": score.split,
        "tiles": sections.tiles(record),
        "findings": findings(record),
        "costs": sections.costs(record),
        "certainty": sections.certainty(record),
        "scores": [(s.metric, s.split, f"{s.value:.2f}") for s in record.scores],
        "parameters": sections.parameters(record),
        "modules": sections.modules(record),
        "facts": sections.facts(record),
        "recipe_link": recipe_link,
        "recipe": json.dumps(record.recipe, indent=2, ensure_ascii=False),
        "base": str(record.recipe.get("model", "the base model")),
    }


def _figure(figure: Figure, folder: str | None) -> dict[str, Any]:
    """A figure as the template shows it: its drawing is SVG of our own making, all else text."""
    files = [] if folder is None else [(s[1:].upper(), f"{folder}/{figure.name}{s}") for s in SUFFIXES]
    return {"title": figure.title, "reading": figure.reading, "svg": page_svg(figure), "files": files}


def _relative(link: str | None, what: str) -> str | None:
    """The link with unsafe characters quoted. Anything but a relative path could call the network or run a script."""
    if link is None:
        return None
    if urlsplit(link).scheme or link.startswith(("/", "\\")):
        raise RankbitsError(f"a {what} must be relative to the page, given {link!r}")
    return quote(link)
