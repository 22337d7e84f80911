"""From columns as they were read to rows that are checked: texts, a label inside the task's range if any, a group."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from rankbits.errors import TaskError

if TYPE_CHECKING:
    from rankbits.tasks.sources import Table
    from rankbits.tasks.task import Task


class Row(NamedTuple):
    """One example: its texts in the order of the task's text columns, and its label and group where it has them."""

    texts: tuple[str, ...]
    label: int | float | None
    group: str | None = None


def rows_of(table: Table, task: Task, *, with_group: bool = False) -> list[Row]:
    """Check a table against a task and return its rows, in order.

    Args:
        table: the columns as read; columns that the task does not know are ignored.
        task: says which columns and labels there must be.
        with_group: also read the task's group column, which must then be there.

    Raises:
        TaskError: a column is missing, there are no rows, a text is not a text, or a label is outside the task's range.
    """
    groups = [task.group_column] if with_group and task.group_column else []
    labelled = [task.label_column] if task.label_column else []
    needed = list(dict.fromkeys([*task.text_columns, *labelled, *groups]))
    # Asked first: an empty JSON Lines file has no columns either, and then it is the rows that are missing.
    if not any(table.columns.values()):
        raise TaskError(f"task {task.name}: {table.origin} is empty; expected at least one row")
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise TaskError(
            f"task {task.name}: {table.origin} has no column {', '.join(missing)}; "
            f"given columns: {', '.join(table.columns)}; expected: {', '.join(needed)}"
        )
    texts = list(zip(*(_texts(table, name, task) for name in task.text_columns), strict=True))
    labels = _labels(table, task, task.label_column) if task.label_column else [None] * len(texts)
    if not groups:
        return [Row(row, label) for row, label in zip(texts, labels, strict=True)]
    films = _texts(table, groups[0], task)
    return [Row(row, label, film) for row, label, film in zip(texts, labels, films, strict=True)]


def _texts(table: Table, column: str, task: Task) -> list[str]:
    values = table.columns[column]
    bad = [index for index, value in enumerate(values) if not isinstance(value, str)]
    if bad:
        raise TaskError(_complaint(table, column, task, bad, "a text"))
    return [str(value) for value in values]


def _labels(table: Table, task: Task, column: str) -> list[int | float | None]:
    values = table.columns[column]
    labels = [_number(value) for value in values]
    if task.kind == "regression":
        low, high = task.label_range or (-math.inf, math.inf)
        bad = [i for i, label in enumerate(labels) if not (math.isfinite(label) and low <= label <= high)]
        if bad:
            raise TaskError(_complaint(table, column, task, bad, f"a finite number from {low} to {high}"))
        return list(labels)
    classes = range(task.num_labels)
    bad = [i for i, label in enumerate(labels) if label not in classes]
    if bad:
        known = ", ".join(f"{number} ({name})" for number, name in enumerate(task.label_names))
        raise TaskError(_complaint(table, column, task, bad, f"one of {known}"))
    return [int(label) for label in labels]


def _number(value: object) -> float:
    """A label as a number, NaN where it is none; CSV files hold their numbers as texts."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _complaint(table: Table, column: str, task: Task, bad: list[int], expected: str) -> str:
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return (
        f"task {task.name}: {table.origin}, row {bad[0] + 1}{more}: "
        f"{column} is {table.columns[column][bad[0]]!r}, expected {expected}"
    )
