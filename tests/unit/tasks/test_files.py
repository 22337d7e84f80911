"""Reading data files: every format gives the same columns, and a broken file says where it is broken."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rankbits.errors import TaskError
from rankbits.tasks.files import ENDINGS, read_columns

ROWS = [{"sentence": "NA", "label": 1}, {"sentence": 'a "b", c\u2028d\né', "label": 0}]
COLUMNS = {"sentence": ["NA", 'a "b", c\u2028d\né'], "label": [1, 0]}


def write(path: Path) -> None:
    """The rows above in the format of the file's ending."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(COLUMNS), path)
        return
    if ".csv" in path.suffixes:
        text = 'sentence,label\nNA,1\n"a ""b"", c\u2028d\né",0\n'
    elif ".json" in path.suffixes:
        text = json.dumps(ROWS, indent=1)
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same_columns(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"train{ending}"
    write(path)
    columns = read_columns(path)
    # CSV has no numbers; its labels are made numbers where they are checked.
    expected = {"sentence": COLUMNS["sentence"], "label": ["1", "0"]} if ".csv" in ending else COLUMNS
    assert columns == expected


def test_json_may_also_hold_one_object_a_line(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"a": 1}\n{"a": 2}')
    assert read_columns(tmp_path / "train.json") == {"a": [1, 2]}


def test_a_value_that_a_row_lacks_is_none(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n{"b": 2}')
    (tmp_path / "train.csv").write_text("a,b\n1\n1,2,3\n")
    assert read_columns(tmp_path / "train.jsonl") == {"a": [1, None], "b": [None, 2]}
    assert read_columns(tmp_path / "train.csv") == {"a": ["1", "1"], "b": [None, "2"]}


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_a_file_without_rows_has_no_columns(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"train{ending}").write_text("")
    assert read_columns(tmp_path / f"train{ending}") == {}


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(TaskError, match=r"train\.jsonl, line 3: not a JSON object"):
        read_columns(tmp_path / "train.jsonl")


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n"text"\n')
    with pytest.raises(TaskError, match=r"train\.jsonl, entry 2: expected a JSON object, given str"):
        read_columns(tmp_path / "train.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", b"\xff\xfe"),
        ("train.json", b"[1, "),
        ("train.jsonl.gz", b"no gzip"),
        ("train.jsonl.gz", gzip.compress(b'{"a": 1}' * 1000, mtime=0)[:-20]),
        ("train.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff\xff\xff"),
        ("train.csv", b'a\n"' + b"x" * 200_000),
        ("train.parquet", b"no parquet"),
    ],
)
def test_a_file_that_is_not_what_its_ending_says_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=rf"{name} cannot be read: "):
        read_columns(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"train\.jsonl cannot be read: FileNotFoundError"):
        read_columns(tmp_path / "train.jsonl")
