"""Where a config is found, and which reader turns it into a shape."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from rankbits.accounting.architectures import decoders, encoders, two_stacks
from rankbits.accounting.architectures.config import Config, Head
from rankbits.accounting.spec import ModelShape
from rankbits.errors import ModelError, UnknownArchitectureError

__all__ = ["Head", "find_config", "read_shape", "shape_names"]

READERS: dict[str, Callable[[Config, Head, int], ModelShape]] = {
    **encoders.READERS,
    **decoders.READERS,
    **two_stacks.READERS,
}
SHAPES = resources.files("rankbits.accounting").joinpath("shapes")


def read_shape(config: Mapping[str, Any], *, name: str, head: Head = Head.NONE, num_labels: int = 2) -> ModelShape:
    """The parts of the model that a config describes, without building it.

    Args:
        config: a parsed config.json, or a config's `to_dict()`.
        name: what the user called the model; messages and tables repeat it.
        head: what stands on top.
        num_labels: outputs of a classification head.

    Raises:
        UnknownArchitectureError: no reader knows its `model_type`.
        ModelError: a size is missing, zero, negative or no number, or the architecture has no such head.
    """
    checked = Config(config, name=name)
    reader = READERS.get(checked.model_type)
    if reader is None:
        raise UnknownArchitectureError(
            f"config of {name}: model_type: given {checked.model_type!r}, expected one of {', '.join(sorted(READERS))}"
        )
    if num_labels < 1:
        raise ModelError(f"num_labels: given {num_labels} for {name}, expected at least 1")
    return reader(checked, head, num_labels)


def shape_names() -> list[str]:
    """Names of the published shapes that come with the package."""
    return sorted(entry.name.removesuffix(".json") for entry in SHAPES.iterdir() if entry.name.endswith(".json"))


def find_config(model: str) -> dict[str, Any]:
    """The config of a model, from this machine alone; nothing is ever downloaded.

    The first that fits: a name of `shape_names()`, a local folder with config.json, a local file, a hub id in the hub's
    local cache, or the hub id of one of our shapes. "./bert-base" means a folder of that name.

    Raises:
        ModelError: there is none, or the file holds no config.
    """
    if model in shape_names():
        return _shape(model)
    try:
        file = _local_file(model) or _in_hub_cache(model)
    except (OSError, RuntimeError):
        # A name longer than any file's, or the folder of a user who does not exist.
        file = None
    if file is not None:
        return _parsed(file, model)
    for shape in map(_shape, shape_names()):
        if shape["_source"] == model:
            return shape
    close = difflib.get_close_matches(model, shape_names(), n=3)
    raise ModelError(
        f"model: no config of {model!r} on this machine: expected "
        + (f"perhaps {' or '.join(close)}, " if close else "")
        + f"one of {', '.join(shape_names())}, a folder with config.json, such a file, or a hub id in the local cache "
        "(`hf download ID config.json` puts it there)"
    )


def _shape(name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(SHAPES.joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return parsed


def _local_file(model: str) -> Path | None:
    path = Path(model).expanduser()
    if path.is_dir():
        return path / "config.json"
    return path if path.is_file() else None


def _parsed(file: Path, model: str) -> dict[str, Any]:
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"model: {model!r}: cannot read {file.name}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"model: {model!r}: {file.name} is not JSON: {error}") from error
    if not isinstance(parsed, dict) or "model_type" not in parsed:
        raise ModelError(
            f"model: {model!r}: {file.name} is not the config of a transformers model: expected an object with a "
            "model_type"
        )
    return parsed


def _in_hub_cache(model: str) -> Path | None:
    """The config.json that the hub's client last fetched for `model`, laid out as huggingface_hub documents it."""
    folder = _hub_cache() / f"models--{model.replace('/', '--')}"
    reference = folder / "refs" / "main"
    if not reference.is_file():
        return None
    config = folder / "snapshots" / reference.read_text(encoding="utf-8").strip() / "config.json"
    return config if config.is_file() else None


def _hub_cache() -> Path:
    """Where huggingface_hub keeps what it has fetched, by its environment variables."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    older = os.environ.get("HUGGINGFACE_HUB_CACHE", f"{home}/hub")
    return Path(os.path.expandvars(os.environ.get("HF_HUB_CACHE", older))).expanduser()
