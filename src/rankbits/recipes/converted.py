"""An embedded GGUF file as a folder that transformers loads like any other, converted once and kept in a cache."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rankbits.embedded import EmbeddedFile, locate, sha256_of
from rankbits.errors import AssetError

CACHE_VARIABLE = "RANKBITS_CACHE"
MANIFEST = "rankbits.json"
"""What the folder was made from and the sha256 of each file in it. Written last: a folder without it is unfinished."""
INSTALL_GGUF = "pip install 'rankbits[gguf]'"


def cache_folder() -> Path:
    """Where converted models are kept: $RANKBITS_CACHE, else rankbits in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rankbits"


def converted_folder(file: EmbeddedFile) -> Path:
    """The folder with config, float32 weights and tokenizer of an embedded GGUF file, made if it is not there.

    transformers reads GGUF files slowly and marks the model as quantized, so that it cannot be saved, although its
    weights are float32 by then; the folder holds the same weights without that mark.

    Raises:
        AssetError: the file or the package that reads it is missing, the cache cannot be written, or what it holds is
            not what was written there.
    """
    folder = cache_folder() / f"{Path(file.path).stem}-{file.sha256[:16]}"
    # Asked for in any case: a cache must not outlive the package it was made from unnoticed.
    source = locate(file)
    if not (folder / MANIFEST).is_file():
        _convert(source, folder, file)
    _check(folder)
    return folder


def _check(folder: Path) -> None:
    """Raise AssetError if a file in the folder is not the one that was written there."""
    advice = f"delete {folder}, and it will be made again"
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        changed = [name for name, expected in hashes.items() if sha256_of(folder / name) != expected]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
        raise AssetError(
            f"{folder} is no complete conversion ({type(reason).__name__}: {reason}); {advice}"
        ) from reason
    if changed:
        raise AssetError(f"{folder / changed[0]} is not the file that was written there: its sha256 differs; {advice}")


def _convert(source: Path, folder: Path, file: EmbeddedFile) -> None:
    if find_spec("gguf") is None:
        raise AssetError(
            f"reading {source.name} of {file.package} {file.version} needs the package gguf, which is not installed; "
            f"install it with: {INSTALL_GGUF}"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
            made = Path(work) / "model"
            _save(source, made)
            hashes = {path.name: sha256_of(path) for path in sorted(made.iterdir())}
            manifest = {"package": file.package, "version": file.version, "source_sha256": file.sha256}
            (made / MANIFEST).write_text(json.dumps({**manifest, "sha256": hashes}, indent=2), encoding="utf-8")
            _put(made, folder)
    except OSError as reason:
        raise AssetError(
            f"the converted {source.name} cannot be kept in {folder.parent} ({reason.strerror or reason}); it needs a "
            f"folder that can be written, with room for the float32 weights: name one in ${CACHE_VARIABLE}"
        ) from reason


def _save(source: Path, folder: Path) -> None:
    """Write the model as transformers would have saved it, had it not come from a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"gguf_file": source.name, "local_files_only": True}
    read: Any = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **given)
    config = type(read.config).from_dict(
        {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    # No memory and no initialisation for weights that are replaced at once.
    with torch.device("meta"):
        plain = type(read)(config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(source.parent), **given).save_pretrained(str(folder))


def _put(made: Path, folder: Path) -> None:
    """Move a finished folder into its place. Another process may have been faster; an unfinished one is replaced."""
    if folder.exists() and not (folder / MANIFEST).is_file():
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not (folder / MANIFEST).is_file():
            raise
