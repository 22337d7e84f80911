"""A printed number, its tolerance, and when a verdict on it is true."""

import pytest

from rankbits.accounting.published.cells import Row, Verdict, half_a_digit, number


@pytest.mark.parametrize(
    ("text", "value", "half"),
    [
        ("1.33M", 1_330_000, 5_000),
        ("184M", 184_000_000, 500_000),
        ("175,255.8M", 175_255_800_000, 50_000),
        ("97.04%", 97.04, 0.005),
        ("100%", 100, 0.5),
        ("65536", 65_536, 0),
        ("0.19151053100118282%", 0.19151053100118282, 5e-18),
    ],
)
def test_a_printed_number_and_half_its_last_digit(text: str, value: float, half: float):
    assert number(text) == value
    assert isinstance(number(text), int) == isinstance(value, int)
    assert half_a_digit(text) == half


@pytest.mark.parametrize("text", ["", "M", "-", "1.3B", "nan%", "about 5M"])
def test_what_is_no_number(text: str):
    with pytest.raises(ValueError, match="is not a"):
        number(text)


def _row(verdict: Verdict, recomputed: float | None, explained: float | None = None) -> Row:
    return Row("table", "cell", "10.0%", verdict, "why", recomputed, tolerance=0.05, explained=explained)


@pytest.mark.parametrize(
    ("verdict", "recomputed", "explained", "holds"),
    [
        (Verdict.REPRODUCED, 10.04, None, True),
        (Verdict.REPRODUCED, 9.94, None, False),
        (Verdict.REPRODUCED, None, None, False),
        (Verdict.MISPRINT, 20.0, None, True),
        (Verdict.MISPRINT, 10.0, None, False),
        (Verdict.MISPRINT, None, None, False),
        (Verdict.MISPRINT, 20.0, 10.0, True),
        (Verdict.MISPRINT, 22.0, 11.0, False),
        (Verdict.IRREPRODUCIBLE, None, None, True),
        (Verdict.IRREPRODUCIBLE, 20.0, None, True),
        (Verdict.IRREPRODUCIBLE, 10.0, None, False),
        (Verdict.INPUT, None, None, True),
        (Verdict.INPUT, 20.0, None, False),
    ],
)
def test_when_a_verdict_holds(verdict: Verdict, recomputed: float | None, explained: float | None, holds: bool):
    assert _row(verdict, recomputed, explained).holds is holds


def test_difference_and_agreement():
    row = _row(Verdict.REPRODUCED, 10.25)
    assert (row.difference, row.agrees) == (0.25, False)
    nothing = _row(Verdict.INPUT, None)
    assert (nothing.difference, nothing.agrees) == (None, None)


def test_a_row_for_machines():
    row = Row("T", "lora", "0.8M", Verdict.REPRODUCED, "why.", 786_432, tolerance=50_000.0)
    assert row.as_json() == {
        "table": "T",
        "cell": "lora",
        "published": "0.8M",
        "published_value": 800_000.0,
        "recomputed": 786_432,
        "tolerance": 50_000.0,
        "verdict": "reproduced",
        "verdict_holds": True,
        "reason": "why.",
    }
