"""One recipe from start to record, as the verbs that train need it: progress, Ctrl-C, and what is said at the end."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from rankbits.cli.pages import write_page
from rankbits.errors import RankbitsError

if TYPE_CHECKING:
    from rankbits.recipes.schema import Recipe
    from rankbits.records import RunRecord

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

    _silence_other_bars()
    quiet_libraries()
    try:
        with progress(Console(stderr=True)) as bar, stop_on_interrupt() as stop:
            return run(recipe, command=command, callbacks=[bar, stop], announce=bar.say)
    except KeyboardInterrupt as interruption:
        message = f"stopped; `{command}` resumes from the last checkpoint in {recipe.output}"
        raise KeyboardInterrupt(message) from interruption


def _silence_other_bars() -> None:
    # Reading weights and mapping rows take seconds; their bars would only tear ours apart.
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def quiet_libraries() -> None:
    """Silence what libraries print about themselves: their bars, and warnings meant for their own developers."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


def print_runs(records: Sequence[RunRecord]) -> None:
    """Print runs beside each other, one row each."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from rankbits.reports.tables import COLUMNS, run_table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        # Eighty columns are narrow for this table: what is one word stays whole, the rest may take two lines.
        whole = max(len(word) for word in column.split())
        table.add_column(column, min_width=whole, no_wrap=" " not in column and column != "score", overflow="fold")
    for row in run_table(records):
        table.add_row(*row)
    Console().print(table)


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
