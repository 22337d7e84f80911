"""`rankbits published`: what papers printed beside what the formulas give, cell by cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import typer

from rankbits.accounting.published import PublishedTable, Row, Verdict

WIDTH = 80
"""Columns of the output, on any terminal."""

Table = Annotated[PublishedTable | None, typer.Argument(help="Which table; all of them without one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON list of all cells instead of tables.")]


def published(table: Table = None, as_json: AsJson = False) -> None:
    """Recompute the tables of Bayesian-LoRA, and parameter counts and memory as papers and a lecture print them.

    Exits with 1 if a verdict does not hold: a cell marked as reproduced that is not, or a misprint that agrees.
    """
    from rankbits.accounting.published import rows

    wanted = [table] if table is not None else list(PublishedTable)
    cells = {each: rows(each) for each in wanted}
    if as_json:
        _print_json(cells)
    else:
        for each in wanted:
            _print_table(each, cells[each])
    wrong = [row for each in wanted for row in cells[each] if not row.holds]
    for row in wrong:
        typer.echo(f"error: {row.table}: {row.cell} is marked {row.verdict.value!r} and is not", err=True)
    if wrong:
        raise typer.Exit(1)


def _print_json(cells: dict[PublishedTable, list[Row]]) -> None:
    import json

    from rankbits.accounting.published import heading

    listed: list[dict[str, object]] = []
    for table, rows in cells.items():
        listed += [{"of": table.value, **row.as_json(), "conditions": heading(table)} for row in rows]
    typer.echo(json.dumps(listed, indent=1))


def _print_table(table: PublishedTable, rows: Sequence[Row]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    from rankbits.accounting.published import heading

    console = Console(width=WIDTH, highlight=False)
    console.print(f"{table.value}: {heading(table)}", markup=False)
    notes: dict[str, int] = {}
    for source in dict.fromkeys(row.table for row in rows):
        drawn = RichTable(box=SIMPLE_HEAD, pad_edge=False, width=WIDTH, title=escape(source), title_justify="left")
        drawn.add_column("cell", ratio=1, overflow="fold")
        for column in ("printed", "recomputed"):
            drawn.add_column(column, justify="right", no_wrap=True)
        drawn.add_column("verdict", no_wrap=True)
        drawn.add_column("note", justify="right", no_wrap=True)
        for row in (row for row in rows if row.table == source):
            note = notes.setdefault(row.reason, len(notes) + 1)
            shown = (row.cell, _shorter(row.published), _recomputed(row), row.verdict.value, str(note))
            drawn.add_row(*map(escape, shown))
        console.print(drawn)
    for reason, note in notes.items():
        console.print(f"{note:3d}  {reason}", markup=False)
    counted = Counter(row.verdict for row in rows)
    summary = ", ".join(f"{counted[verdict]} {verdict.value}" for verdict in Verdict if counted[verdict])
    console.print(f"\n{len(rows)} cells: {summary}\n", markup=False)


def _recomputed(row: Row) -> str:
    if row.recomputed is None:
        return "from training" if row.verdict is Verdict.INPUT else "-"
    return f"{row.recomputed:,}" if isinstance(row.recomputed, int) else f"{row.recomputed:.4f}%"


def _shorter(text: str) -> str:
    """A print-out of all digits a float has would leave no room for the rest."""
    return text if len(text) <= 12 else f"{text[:8]}...{text[-1]}"
