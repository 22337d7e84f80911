"""`rankbits quickstart`: the main job on the embedded model and data, beside plain LoRA's stored result."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from rankbits.cli.overrides import Overrides


def quickstart(
    overrides: Overrides = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Run plain LoRA on the same work instead.")] = False,
) -> None:
    """Run the main job on the embedded model and data: no network, no arguments."""
    from rankbits.cli.neighbour import find_neighbour
    from rankbits.cli.running import print_files, print_runs, run_recipe
    from rankbits.recipes.load import load

    changes = overrides or []
    loaded = load("quickstart", [*changes, "method=lora"] if baseline else changes)
    option = ["--baseline"] if baseline else []
    record = run_recipe(loaded, shlex.join(["rankbits", "quickstart", *option, *changes]))
    if record.method == "lora":
        print_runs([record])
    else:
        neighbour, note = find_neighbour(record)
        print_runs([record] if neighbour is None else [record, neighbour])
        typer.echo(note)
    print_files(record, Path(str(loaded.output)))
