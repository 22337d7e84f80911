"""Which formats a model can leave in, and which one a path asks for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from rankbits.errors import ExportError


class Format(str, Enum):
    """What is written: a plain LoRA adapter for PEFT, or a whole model for transformers, each a folder."""

    LORA = "lora"
    MERGED = "merged"


def format_of(path: Path, to: str | None) -> Format:
    """The format that was asked for.

    Args:
        path: where to write; its suffix names the format where nothing else does.
        to: name of a format, or None.

    Raises:
        ExportError: there is no such format, or neither names one.
    """
    names = [known.value for known in Format]
    wanted = path.suffix.removeprefix(".") if to is None else to
    if not wanted:
        raise ExportError(f"{path} has no suffix that names a format: say which with to=..., one of {', '.join(names)}")
    if wanted not in names:
        given = f"to={to!r}" if to is not None else f"{path}, whose suffix stands for {wanted!r},"
        raise ExportError(f"{given} is no format that can be written: expected one of {', '.join(names)}")
    return Format(wanted)
