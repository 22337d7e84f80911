"""`rankbits train`: fine-tune what a recipe says; resumes where it stopped."""

from __future__ import annotations

import shlex
from pathlib import Path

from rankbits.cli.overrides import Overrides, RecipeName


def train(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Fine-tune; resumes where it stopped."""
    from rankbits.cli.running import print_files, print_runs, run_recipe
    from rankbits.recipes.load import load

    changes = overrides or []
    loaded = load(recipe, changes)
    record = run_recipe(loaded, shlex.join(["rankbits", "train", recipe, *changes]))
    print_runs([record])
    print_files(record, Path(str(loaded.output)))
