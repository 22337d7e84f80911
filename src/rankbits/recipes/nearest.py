"""The known name that a mistyped one most likely meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(given: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The `count` known names closest to `given`, best first; empty if none is close.

    A name also counts as close if its last part is, so that `stsb` finds `glue/minilm/stsb` and `epochs` finds
    `training.epochs`.
    """
    candidates = list(known)
    whole = difflib.get_close_matches(given, candidates, n=count, cutoff=0.6)
    by_part = _by_last_part(given, candidates, count)
    return list(dict.fromkeys([*whole, *by_part]))[:count]


def _by_last_part(given: str, candidates: Sequence[str], count: int) -> list[str]:
    parts: dict[str, list[str]] = {}
    for candidate in candidates:
        parts.setdefault(_last_part(candidate), []).append(candidate)
    close = difflib.get_close_matches(_last_part(given), parts, n=count, cutoff=0.7)
    return [candidate for part in close for candidate in parts[part]]


def _last_part(name: str) -> str:
    return name.replace("/", ".").rsplit(".", 1)[-1]
