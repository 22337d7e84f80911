"""The one way out: check, write beside the place, verify if asked, and only then move it there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from torch import Tensor

from rankbits.errors import ExportError
from rankbits.export import lora, merged
from rankbits.export.active import active_adapter
from rankbits.export.folder import appearing, refuse_taken
from rankbits.export.format import Format, format_of
from rankbits.export.verify import Verification, verify

WRITERS = {Format.LORA: lora.prepare, Format.MERGED: merged.prepare}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: the folder.
        format: its format.
        verification: how near the reloaded model came; None if no example inputs were given.
    """

    path: Path
    format: Format
    verification: Verification | None


def export(
    model: PeftModel,
    path: str | Path,
    to: str | None = None,
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
) -> Exported:
    """Write a model, with its active adapter, so that others load it without rankbits.

    - "lora": a plain LoRA adapter with exactly the same update, which PEFT alone loads. Of DyLoRA (at its evaluation
      rank), SBoRA, MoRA without blocks, Bayesian-LoRA without quantizers, and LoRA itself, on any base.
    - "merged": the whole model with the update in its weights, which transformers alone loads. Of every method whose
      update is one of weights, on a base that is not quantized.

    The model is not changed. A folder appears whole or not at all.

    Args:
        model: a PEFT model with one active adapter, hardened if it learned ranks or bits.
        path: a folder that is empty or does not exist.
        to: the format; None reads it off the suffix of `path`.
        example_inputs: keyword arguments of the model, on its device. With them, what was written is reloaded with the
            library it is meant for, and its outputs are compared before anything appears at `path`.

    Returns:
        Where, what, and how near the reloaded model came.

    Raises:
        ExportError: the format is unknown, the model cannot be written in it exactly, `path` is taken, or what was
            reloaded differs by more than the tolerance of `Verification`. Nothing is left behind.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    chosen = format_of(path, to)
    adapter_name = active_adapter(model)
    refuse_taken(path)
    write = WRITERS[chosen](model, adapter_name)
    with appearing(path) as folder:
        write(folder)
        verification = None if example_inputs is None else verify(model, folder, chosen, example_inputs)
        if verification is not None and not verification.holds:
            raise ExportError(f"what was written to {path} does not compute what the model does: {verification}")
    return Exported(path, chosen, verification)
