"""From a table to checked rows: every way in which a table can be wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from rankbits import tasks
from rankbits.errors import TaskError
from rankbits.tasks.rows import Row, rows_of
from rankbits.tasks.sources import Table

SST2, STSB, FILMS = tasks.get("sst2"), tasks.get("stsb"), tasks.get("film-reviews")


def table(**columns: list[object]) -> Table:
    return Table(columns, origin="train.jsonl")


def test_rows_hold_the_texts_in_the_order_of_the_task() -> None:
    rows = rows_of(table(sentence2=["b"], label=[2.5], sentence1=["a"], idx=[0]), STSB)
    assert rows == [Row(("a", "b"), 2.5, None)]


def test_labels_of_classes_become_integers_also_from_texts() -> None:
    rows = rows_of(table(sentence=["a", "b", "c"], label=[1, "0", 1.0]), SST2)
    assert [(row.label, type(row.label)) for row in rows] == [(1, int), (0, int), (1, int)]


def test_labels_of_a_regression_become_floats_also_from_texts() -> None:
    rows = rows_of(table(sentence1=["a", "b"], sentence2=["c", "d"], label=[5, "3.8"]), STSB)
    assert [(row.label, type(row.label)) for row in rows] == [(5.0, float), (3.8, float)]


def test_the_group_is_read_when_asked_for() -> None:
    films = table(text=["a"], label=[1], film=["alien"])
    assert rows_of(films, FILMS, with_group=True) == [Row(("a",), 1, "alien")]
    assert rows_of(films, FILMS) == [Row(("a",), 1, None)]


def test_a_task_without_groups_needs_no_such_column() -> None:
    assert rows_of(table(sentence=["a"], label=[1]), SST2, with_group=True) == [Row(("a",), 1, None)]


def test_missing_columns_are_all_named_beside_the_given_and_the_expected_ones() -> None:
    with pytest.raises(TaskError) as caught:
        rows_of(table(sentence1=["a"], score=[1.0]), STSB)
    message = str(caught.value)
    assert "task stsb: train.jsonl has no column sentence2, label" in message
    assert "given columns: sentence1, score" in message
    assert "expected: sentence1, sentence2, label" in message


def test_a_missing_group_column_is_named_when_needed() -> None:
    with pytest.raises(TaskError, match="no column film"):
        rows_of(table(text=["a"], label=[1]), FILMS, with_group=True)


@pytest.mark.parametrize("columns", [{}, {"sentence": [], "label": []}])
def test_an_empty_split_is_refused(columns: dict[str, list[object]]) -> None:
    with pytest.raises(TaskError, match=r"train\.jsonl is empty; expected at least one row"):
        rows_of(table(**columns), SST2)


@pytest.mark.parametrize("label", [-1, 2, 0.5, None, "fresh", "", True, math.nan, math.inf, [1], 10**400])
def test_a_label_outside_the_classes_is_refused_with_value_row_and_classes(label: object) -> None:
    with pytest.raises(TaskError) as caught:
        rows_of(table(sentence=["a", "b", "c"], label=[0, label, 1]), SST2)
    message = str(caught.value)
    assert f"train.jsonl, row 2: label is {label!r}, expected one of 0 (negative), 1 (positive)" in message


@pytest.mark.parametrize("label", [-0.1, 5.1, math.nan, math.inf, None, "high"])
def test_a_value_outside_the_range_is_refused_with_value_row_and_range(label: object) -> None:
    with pytest.raises(TaskError) as caught:
        rows_of(table(sentence1=["a", "b"], sentence2=["c", "d"], label=[0.0, label]), STSB)
    assert f"row 2: label is {label!r}, expected a finite number from 0.0 to 5.0" in str(caught.value)


@pytest.mark.parametrize("label", [math.nan, math.inf, -math.inf])
def test_a_regression_without_a_range_still_needs_finite_labels(label: float) -> None:
    with pytest.raises(TaskError, match="expected a finite number"):
        rows_of(table(sentence1=["a"], sentence2=["c"], label=[label]), replace(STSB, label_range=None))


def test_the_message_counts_the_other_bad_labels() -> None:
    with pytest.raises(TaskError, match="row 1 and 2 more: label is -1"):
        rows_of(table(sentence=["a", "b", "c"], label=[-1, -1, -1]), SST2)


@pytest.mark.parametrize("text", [None, 7, ["a"]])
def test_a_text_that_is_none_is_refused_with_value_row_and_column(text: object) -> None:
    with pytest.raises(TaskError) as caught:
        rows_of(table(sentence=["a", text], label=[0, 1]), SST2)
    assert f"row 2: sentence is {text!r}, expected a text" in str(caught.value)
