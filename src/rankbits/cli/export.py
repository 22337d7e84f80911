"""`rankbits export`: write a finished run so that others load it without rankbits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]
To = Annotated[
    str, typer.Option(metavar="lora|merged", help="A plain LoRA adapter for PEFT, or a whole model for transformers.")
]
Output = Annotated[
    Path | None, typer.Option(help="A new or empty folder; by default one in RUN with the name of the format.")
]
PROBE = "What was exported has to compute what was trained."
"""Any text does: both models read the same."""


def export(run: RunFolder, to: To, output: Output = None) -> None:
    """Write a finished run as a plain LoRA adapter or as a merged model, reload it, and compare what both compute."""
    from peft import PeftModel

    from rankbits.cli.running import quiet_libraries
    from rankbits.errors import ExportError
    from rankbits.export.folder import refuse_taken
    from rankbits.export.format import format_of
    from rankbits.export.write import export as write
    from rankbits.recipes.finished import load_finished
    from rankbits.recipes.run_folder import MODEL_FOLDER

    quiet_libraries()
    path = run / to if output is None else output
    # Loading takes long: what can be known before is.
    format_of(path, to)
    refuse_taken(path)
    finished = load_finished(run)
    if not isinstance(finished.model, PeftModel):
        raise ExportError(
            f"{run} was fine-tuned without adapters ({finished.recipe.method}): {run / MODEL_FOLDER} holds the whole "
            "model, which transformers loads as it is"
        )
    tokens = dict(finished.tokenizer(PROBE, return_tensors="pt"))
    exported = write(finished.model, path, to, example_inputs=tokens)
    finished.tokenizer.save_pretrained(str(path))
    typer.echo(f"{exported.format.value}: {path}")
    typer.echo(str(exported.verification))
