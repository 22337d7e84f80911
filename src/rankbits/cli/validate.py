"""`rankbits validate`: check a recipe without loading anything, and print it with every key."""

from __future__ import annotations

import typer

from rankbits.cli.overrides import Overrides, RecipeName


def validate(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Check a recipe and print it with every key."""
    from rankbits.recipes.load import load, resolved_yaml

    loaded = load(recipe, overrides or [])
    typer.echo(resolved_yaml(loaded), nl=False)
    typer.echo("# valid")
