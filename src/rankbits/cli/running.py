"""One recipe from start to record, as the verbs that train need it: progress, Ctrl-C, and what is said at the end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from rankbits.cli.pages import write_page
from rankbits.errors import RankbitsError

if TYPE_CHECKING:
    from rankbits.recipes.schema import Recipe
    from rankbits.records import CostRecord, RunRecord

RECORD = "record.json"
PAGE = "report.html"


def run_recipe(recipe: Recipe, command: str) -> RunRecord:
    """Train a recipe, or continue its unfinished run, with progress on stderr.

    Raises:
        KeyboardInterrupt: Ctrl-C; its text says which command resumes the run.
    """
    # Imported here: these bring torch and transformers, which `--help` and the other verbs do without.
    from rankbits.cli.interrupt import stop_on_interrupt
    from rankbits.cli.progress import progress
    from rankbits.recipes.run import run

    quiet_libraries()
    try:
        with progress(Console(stderr=True)) as bar, stop_on_interrupt() as stop:
            return run(recipe, command=command, callbacks=[bar, stop], announce=bar.say)
    except KeyboardInterrupt as interruption:
        message = f"stopped; `{command}` resumes from the last checkpoint in {recipe.output}"
        raise KeyboardInterrupt(message) from interruption


def quiet_libraries() -> None:
    """Silence what libraries print about themselves: their bars, and warnings meant for their own developers."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


def print_runs(records: Sequence[RunRecord]) -> None:
    """Print runs beside each other, one row each, and below them what they cost, with all conditions."""
    from rankbits.reports.costs import NOT_COUNTED
    from rankbits.reports.tables import COLUMNS, labels, run_table

    _print_table(COLUMNS, run_table(records))
    if all(record.costs is None for record in records):
        typer.echo(f"costs: {NOT_COUNTED}")
        return
    print_cost_comparison({name: record.costs for name, record in zip(labels(records), records, strict=True)})


def print_cost_comparison(costs: Mapping[str, CostRecord | None]) -> None:
    """Print costs beside each other, and below them the conditions without which they mean nothing."""
    from rankbits.reports.costs import compare_costs

    compared = compare_costs(costs)
    _print_table(compared.columns, compared.rows)
    for note in compared.notes:
        Console().print(note, markup=False, highlight=False)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. Eighty columns are narrow: headings and cells break between words and take several lines."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    # Beside each column stand its padding and a divider.
    room = console.width - 2 * len(columns)
    cells = [[column, *(row[place] for row in rows)] for place, column in enumerate(columns)]
    for column, width in zip(columns, column_widths(cells, room), strict=True):
        table.add_column(column, width=width, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def column_widths(columns: Sequence[Sequence[str]], room: int) -> list[int]:
    """How wide to make columns of cells: the longest word at least, and what they need as far as there is room.

    Columns that need the least more are served first. Where not even the longest words fit, the widest give way.
    """
    wanted = [max(len(cell) for cell in cells) for cells in columns]
    widths = [max(len(word) for cell in cells for word in cell.split() or [""]) for cells in columns]
    while sum(widths) > room and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    for place in sorted(range(len(columns)), key=lambda place: wanted[place] - widths[place]):
        widths[place] += max(0, min(wanted[place] - widths[place], room - sum(widths)))
    return widths


def print_files(record: RunRecord, folder: Path) -> None:
    """Write the page of a finished run and say where record and page are.

    A page that cannot be made does not undo the run: the reason is printed in its place.
    """
    typer.echo(f"record: {folder / RECORD}")
    try:
        write_page([(record, folder)], folder / PAGE)
    except RankbitsError as error:
        typer.echo(f"no page: {error}", err=True)
    else:
        typer.echo(f"page:   {folder / PAGE}")
