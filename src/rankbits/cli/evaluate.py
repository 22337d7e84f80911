"""`rankbits evaluate`: score a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]


def evaluate(
    run: RunFolder,
    task: Annotated[str | None, typer.Option(help="Another task than the run's own.")] = None,
    data: Annotated[str | None, typer.Option(help="A folder of local files or a hub data set.")] = None,
) -> None:
    """Score a finished run."""
    from rich.console import Console
    from rich.table import Table

    from rankbits.cli.running import quiet_libraries
    from rankbits.recipes.run import evaluate as score_run
    from rankbits.records.metrics import lower_is_better, unit

    quiet_libraries()
    table = Table("split", "metric", "score", "unit")
    for score in score_run(run, task=task, data=data):
        direction = ", less is better" if lower_is_better(score.metric) else ""
        table.add_row(score.split, score.metric, f"{score.value:.2f}", unit(score.metric) + direction)
    Console().print(table)
