"""Which rows are used: duplicates, overlaps, held-out slices and subsets, decided by what the rows say alone.

No choice here depends on a seed, on Python's hash seed or on the order of a file: rows are drawn by the SHA-256 of
their own content, so that every method, every seed and every machine works on the same rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from rankbits.tasks.rows import Row

Key = tuple[str, ...]


def without_duplicates(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Keep the first of the rows that have the same texts and label; also return how many were dropped.

    Texts count as the same when they differ only in white space. Equal texts with different labels are all kept: that
    is noise in the labels, which a task's training set may hold.
    """
    first: dict[tuple[Key, int | float | None], Row] = {}
    for row in rows:
        first.setdefault((_key(row), row.label), row)
    return list(first.values()), len(rows) - len(first)


def without_texts_of(
    rows: Iterable[Row], evaluation: Iterable[Row], *, symmetric: bool
) -> tuple[list[Row], dict[str, int]]:
    """Drop the rows whose texts also occur in an evaluation split, whatever their label.

    Args:
        rows: training rows.
        evaluation: rows of all evaluation splits together.
        symmetric: also drop pairs that occur there with their two texts exchanged.

    Returns:
        The rows that stay, and how many were dropped for each reason.
    """
    seen = {_key(row) for row in evaluation}
    kept: list[Row] = []
    dropped = {"in_evaluation": 0} | ({"swapped_in_evaluation": 0} if symmetric else {})
    for row in rows:
        key = _key(row)
        if key in seen:
            dropped["in_evaluation"] += 1
        elif symmetric and key[::-1] in seen:
            dropped["swapped_in_evaluation"] += 1
        else:
            kept.append(row)
    return kept, dropped


def without_groups_of(rows: Iterable[Row], evaluation: Iterable[Row]) -> tuple[list[Row], dict[str, int]]:
    """Drop the rows whose group also occurs in an evaluation split: the same prompt, whatever its answer.

    Returns:
        The rows that stay, and how many were dropped for that reason.
    """
    given = list(rows)
    seen = {_group(row) for row in evaluation}
    kept = [row for row in given if _group(row) not in seen]
    return kept, {"in_evaluation": len(given) - len(kept)}


def hold_out(rows: Sequence[Row], fraction: float, *, salt: str) -> tuple[list[Row], list[Row]]:
    """Split rows into a part that stays and a part that is held out, never dividing a group.

    A group is what the row names as such, or else its texts. Groups are taken in the order of their hash until the part
    held out has at least `fraction` of the rows.

    Args:
        rows: the rows to split.
        fraction: share of the rows to hold out, from 0 to 1.
        salt: two splits with different salts are independent.

    Returns:
        The rows that stay and the rows held out, each in the order given.
    """
    sizes: dict[Key, int] = {}
    for row in rows:
        sizes[_group(row)] = sizes.get(_group(row), 0) + 1
    held: set[Key] = set()
    taken = 0
    for group in sorted(sizes, key=lambda group: _digest(salt, group)):
        if taken >= fraction * len(rows):
            break
        held.add(group)
        taken += sizes[group]
    return [r for r in rows if _group(r) not in held], [r for r in rows if _group(r) in held]


def subset(rows: Sequence[Row], count: int) -> list[Row]:
    """Draw `count` rows by the hash of their content, in the order given; a smaller subset lies inside a larger one."""
    ranked = sorted(range(len(rows)), key=lambda i: _digest("subset", (*_key(rows[i]), repr(rows[i].label))))
    drawn = set(ranked[:count])
    return [row for index, row in enumerate(rows) if index in drawn]


def fingerprint(splits: Iterable[tuple[str, Iterable[Row]]]) -> str:
    """SHA-256, in hex, over the names of the splits and every text and label in them, in order."""
    digest = hashlib.sha256()
    for name, rows in splits:
        for row in rows:
            digest.update(json.dumps([name, *row.texts, row.label]).encode())
            digest.update(b"\n")
    return digest.hexdigest()


def _key(row: Row) -> Key:
    return tuple(" ".join(text.split()) for text in row.texts)


def _group(row: Row) -> Key:
    return _key(row) if row.group is None else (row.group,)


def _digest(salt: str, key: Key) -> bytes:
    return hashlib.sha256(json.dumps([salt, *key]).encode()).digest()
