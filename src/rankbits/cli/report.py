"""`rankbits report`: one self-contained page for one or several runs, and its figures as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rankbits.cli.pages import write_page
from rankbits.errors import RankbitsError

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")]
Output = Annotated[Path | None, typer.Option(help="The page to write; by default report.html in the run's folder.")]

Figures = Annotated[
    Path | None,
    typer.Option(help="The folder for the figures as SVG, PNG and CSV; by default `figures` beside the page."),
]


def report(runs: Runs, output: Output = None, figures: Figures = None) -> None:
    """Draw one self-contained HTML page with its figures as files; several runs stand beside each other."""
    from rankbits.records import RunRecord

    page = _page(runs, output)
    folder = write_page([(RunRecord.read(folder / "record.json"), folder) for folder in runs], page, figures)
    typer.echo(f"page: {page}")
    if folder.is_dir():
        typer.echo(f"figures: {folder}")


def _page(runs: Sequence[Path], output: Path | None) -> Path:
    if output is None:
        if len(runs) == 1:
            return runs[0] / "report.html"
        raise RankbitsError(f"{len(runs)} runs are given, which have no common folder: name the page with --output")
    if output.suffix not in {".html", ".htm"}:
        raise RankbitsError(f"--output {output}: expected a file that ends in .html")
    return output
