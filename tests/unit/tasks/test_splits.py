"""Duplicates, overlaps, held-out slices and subsets: what stays, what goes, and that nothing random decides it."""

from __future__ import annotations

import hashlib

import pytest

from rankbits.tasks.rows import Row
from rankbits.tasks.splits import fingerprint, hold_out, subset, without_duplicates, without_texts_of

ROWS = [Row((f"sentence {number}",), number % 2) for number in range(100)]
FILMS = [Row((f"review {number}",), number % 2, group=f"film {number % 20}") for number in range(100)]


def test_the_first_of_equal_rows_stays_and_order_is_kept() -> None:
    first, second, other = Row(("a", "b"), 1, "one"), Row((" a", "b\n"), 1, "two"), Row(("c", "d"), 1)
    assert without_duplicates([first, other, second]) == ([first, other], 1)


def test_equal_texts_with_other_labels_and_exchanged_texts_are_no_duplicates() -> None:
    rows = [Row(("a", "b"), 1), Row(("a", "b"), 0), Row(("b", "a"), 1), Row(("A", "b"), 1), Row(("ab", ""), 1)]
    assert without_duplicates(rows) == (rows, 0)


def test_rows_whose_texts_are_evaluated_go_whatever_their_label() -> None:
    rows = [Row(("a", "b"), 1), Row(("b", "a"), 1), Row(("a ", "c"), 0)]
    kept, dropped = without_texts_of(rows, [Row(("a", "b"), 0), Row(("a", "c"), 0)], symmetric=False)
    assert (kept, dropped) == ([rows[1]], {"in_evaluation": 2})


def test_exchanged_pairs_go_too_where_order_means_nothing() -> None:
    rows = [Row(("a", "b"), 1.0), Row(("b", "a"), 1.0), Row(("c", "a"), 0.0)]
    kept, dropped = without_texts_of(rows, [Row(("a", "b"), 0.0)], symmetric=True)
    assert (kept, dropped) == ([rows[2]], {"in_evaluation": 1, "swapped_in_evaluation": 1})


@pytest.mark.parametrize("fraction", [0.1, 0.2])
def test_holding_out_divides_no_group_and_loses_no_row(fraction: float) -> None:
    kept, held = hold_out(FILMS, fraction, salt="x")
    assert {row.group for row in kept}.isdisjoint({row.group for row in held})
    assert sorted(kept + held) == sorted(FILMS)
    assert len(held) == round(fraction * 100)


def test_rows_without_a_group_are_grouped_by_their_texts() -> None:
    noisy = [row for row in ROWS for row in (row, row._replace(label=1 - row.label))]
    kept, held = hold_out(noisy, 0.1, salt="x")
    assert {row.texts for row in kept}.isdisjoint({row.texts for row in held})
    assert len(held) == 20


def test_holding_out_depends_on_the_content_alone() -> None:
    kept, held = hold_out(ROWS, 0.1, salt="x")
    assert hold_out(ROWS[::-1], 0.1, salt="x") == (kept[::-1], held[::-1])
    assert hold_out(ROWS, 0.1, salt="y") != (kept, held)


def test_the_rows_held_out_are_these_on_every_machine() -> None:
    _, held = hold_out(ROWS, 0.05, salt="development")
    assert [row.texts[0] for row in held] == [f"sentence {number}" for number in (0, 23, 67, 68, 97)]


def test_the_subset_is_this_one_on_every_machine() -> None:
    assert [row.texts[0] for row in subset(ROWS, 5)] == [f"sentence {number}" for number in (19, 34, 37, 60, 66)]


def test_a_subset_has_the_rows_asked_for_in_their_order_and_lies_in_a_larger_one() -> None:
    small, large = subset(ROWS, 10), subset(ROWS, 40)
    assert (len(small), len(large)) == (10, 40)
    assert small == [row for row in ROWS if row in small]
    assert set(small) < set(large)
    assert subset(ROWS[::-1], 10) == small[::-1]


def test_the_subset_is_no_part_of_the_order_that_holding_out_follows() -> None:
    _, held = hold_out(ROWS, 0.1, salt="development")
    assert set(subset(ROWS, 10)) != set(held)


def test_the_fingerprint_sees_texts_labels_order_and_splits() -> None:
    base = fingerprint([("train", ROWS[:3]), ("validation", ROWS[3:4])])
    others = [
        [("train", [ROWS[0], ROWS[1], Row(("other",), 0)]), ("validation", ROWS[3:4])],
        [("train", [ROWS[0], ROWS[1], ROWS[2]._replace(label=1)]), ("validation", ROWS[3:4])],
        [("train", ROWS[2::-1]), ("validation", ROWS[3:4])],
        [("train", ROWS[:4])],
        [("train", ROWS[:3]), ("development", ROWS[3:4])],
    ]
    assert base == fingerprint([("train", iter(ROWS[:3])), ("validation", ROWS[3:4])])
    assert len({base, *(fingerprint(other) for other in others)}) == 6


def test_the_fingerprint_is_this_one_on_every_machine() -> None:
    by_hand = hashlib.sha256(b'["train", "\\u00e9", "b", 2.5]\n').hexdigest()
    assert fingerprint([("train", [Row(("é", "b"), 2.5)])]) == by_hand
