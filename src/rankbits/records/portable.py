"""Text and values that mean the same on every machine: no absolute path, one hash for the same work."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from rankbits.errors import RecordError

# A URL's "//" follows a colon, a relative path's "/" a letter or a dot: neither says where this machine keeps things.
_LOCAL_PATH = re.compile(r"""(?<![\w./\\~])(?:file://)?(?:[A-Za-z]:[\\/]|\\\\|~[\w.-]*/|/)(?=[^\s/])[^\s"'=,;]*""")


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """Sha256 (64 hex digits) of a recipe's canonical JSON.

    The order of keys, `1` against `1.0`, and the folder an absolute path points into do not change it, so that the same
    work has the same hash on every machine. Raises RecordError for a value that JSON cannot hold.
    """
    try:
        canonical = _canonical_numbers(portable(dict(recipe), "recipe"))
    except ValueError as error:
        raise RecordError(f"cannot hash the recipe: {error}") from None
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def without_local_paths(text: str) -> str:
    """The text with each absolute path in it shortened to its last part ("/home/me/a.yaml" becomes "a.yaml")."""
    return _LOCAL_PATH.sub(lambda match: _last_part(match.group()), text)


def portable(value: Any, where: str) -> Any:
    """The value as plain JSON with absolute paths shortened; ValueError names the place JSON cannot hold."""
    if isinstance(value, str):
        return shorten(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if value - value != 0:
            raise ValueError(f"{where}: expected a finite number, given {value}")
        return value
    if isinstance(value, list | tuple):
        return [portable(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: portable(item, f"{where}.{key}") for key, item in value.items()}
    raise ValueError(f"{where}: expected a JSON value, given {type(value).__name__} {value!r}")


def _canonical_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_canonical_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _canonical_numbers(item) for key, item in value.items()}
    return value


def shorten(text: str) -> str:
    """A value that is one absolute path, blanks and all, keeps its last part; other text is searched for paths."""
    return _last_part(text) if _LOCAL_PATH.match(text) else without_local_paths(text)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
