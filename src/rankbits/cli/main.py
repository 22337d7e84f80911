"""The `rankbits` command: its verbs and how they end."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from rankbits.cli.estimate import estimate
from rankbits.cli.evaluate import evaluate
from rankbits.cli.export import export
from rankbits.cli.guard import guarded
from rankbits.cli.list import list_kind
from rankbits.cli.published import published
from rankbits.cli.quickstart import quickstart
from rankbits.cli.report import report
from rankbits.cli.train import train
from rankbits.cli.validate import validate

app = typer.Typer(
    name="rankbits",
    help="Fine-tuning that learns the rank and the bit width of every adapted matrix.",
    no_args_is_help=True,
    add_completion=False,
    # A defect shows Python's own traceback: complete, and without the values of local variables.
    pretty_exceptions_enable=False,
)

_VERBS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "train": train,
    "evaluate": evaluate,
    "report": report,
    "export": export,
    "estimate": estimate,
    "published": published,
    "validate": validate,
    "list": list_kind,
}
for _name, _verb in _VERBS.items():
    app.command(_name)(guarded(_verb))


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(version("rankbits"))
    except PackageNotFoundError:
        typer.echo("unknown: rankbits runs from a source folder and is not installed")
    raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del show_version


def main() -> None:
    """Run the command that was typed, and exit with its code."""
    app()
