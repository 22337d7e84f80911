"""Reading one data file into columns: JSON Lines, JSON, CSV and Parquet, the first three also compressed by gzip."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from rankbits.errors import TaskError

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")


def read_columns(path: Path) -> dict[str, list[object]]:
    """Columns of a data file by name, all of the same length; a value that a row lacks is None.

    Values are not guessed at: a text such as "NA" or "007" stays a text.

    Raises:
        TaskError: the file cannot be read or is not what its ending says.
    """
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            columns: dict[str, list[object]] = parquet.read_table(path).to_pydict()
            return columns
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
            return _by_column(_read_csv(stream) if ".csv" in path.suffixes else _read_json(stream, path))
    except (OSError, ValueError, EOFError, zlib.error, csv.Error) as error:
        raise TaskError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _read_csv(stream: TextIO) -> list[dict[str, object]]:
    # A row that is too long comes with its rest under None, which is no column.
    return [{name: value for name, value in row.items() if name is not None} for row in csv.DictReader(stream)]


def _read_json(stream: TextIO, path: Path) -> list[dict[str, object]]:
    """One object a line, or one list of objects."""
    text = stream.read()
    if text.lstrip().startswith("["):
        rows = list(enumerate(json.loads(text), start=1))
    else:
        rows = []
        # Not splitlines: it also cuts at separators that JSON allows inside a string.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise TaskError(f"{path}, line {number}: not a JSON object: {error}") from error
    for number, row in rows:
        if not isinstance(row, dict):
            raise TaskError(f"{path}, entry {number}: expected a JSON object, given {type(row).__name__}")
    return [row for _, row in rows]


def _by_column(rows: Iterable[dict[str, object]]) -> dict[str, list[object]]:
    given = list(rows)
    names = list(dict.fromkeys(name for row in given for name in row))
    return {name: [row.get(name) for row in given] for name in names}
