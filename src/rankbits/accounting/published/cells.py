"""A published cell beside its recomputed value: what was printed, what the formulas give, and whether they agree."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import Enum
from typing import Any

UNITS = {"%": 1, "M": 10**6, "GB": 10**9, "": 1}
"""What a number is followed by: percent, millions, decimal gigabytes, or nothing."""


class Verdict(str, Enum):
    """What can be said about a published cell."""

    REPRODUCED = "reproduced"
    """The formulas give it, within its tolerance."""
    MISPRINT = "misprint"
    """The formulas give another number, and the other cells speak for that one."""
    IRREPRODUCIBLE = "cannot be reproduced"
    """No convention that we know gives it, or what it needs is not stated."""
    INPUT = "input"
    """It came out of training: no formula gives it, and others are computed from it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One cell.

    Args:
        table: where it was printed.
        cell: which cell.
        published: as it was printed, with %, M or GB.
        verdict: what we hold of it.
        reason: why, or by which convention.
        recomputed: our value in units (parameters, percent, bytes), None where there is none.
        tolerance: the largest difference that rounding or truncation explains, in the same unit; 0 is exact.
        explained: what the reason says was printed in place of the true value, if it says so in numbers.
    """

    table: str
    cell: str
    published: str
    verdict: Verdict
    reason: str
    recomputed: int | float | None = None
    tolerance: float = 0.0
    explained: int | float | None = None

    @property
    def difference(self) -> float | None:
        """Recomputed minus published; None without a recomputed value."""
        return None if self.recomputed is None else float(self.recomputed - number(self.published))

    @property
    def agrees(self) -> bool | None:
        """Whether the recomputed value is the published one within the tolerance; None without one."""
        return None if self.difference is None else abs(self.difference) <= self.tolerance

    @property
    def holds(self) -> bool:
        """Whether the verdict is true.

        A reproduced cell agrees; a misprint does not, and is what its reason says was printed; a cell that cannot be
        reproduced is not reproduced by accident; an input has no recomputed value.
        """
        if self.verdict is Verdict.REPRODUCED:
            return self.agrees is True
        if self.verdict is Verdict.MISPRINT:
            printed = self.explained is None or abs(self.explained - number(self.published)) <= self.tolerance
            return self.agrees is False and printed
        return self.recomputed is None or (self.verdict is Verdict.IRREPRODUCIBLE and not self.agrees)

    def as_json(self) -> dict[str, Any]:
        """The row for machines: recomputed integers exact, everything in units."""
        return {
            "table": self.table,
            "cell": self.cell,
            "published": self.published,
            "published_value": float(number(self.published)),
            "recomputed": self.recomputed,
            "tolerance": self.tolerance,
            "verdict": self.verdict.value,
            "verdict_holds": self.holds,
            "reason": self.reason,
        }


def number(text: str) -> float | int:
    """The number that a printed text stands for: "1.33M" is 1,330,000 and "97.04%" is 97.04.

    Raises:
        ValueError: the text is no number with %, M, GB or nothing behind it.
    """
    digits, unit = _parted(text)
    value = digits * UNITS[unit]
    return int(value) if value == value.to_integral_value() else float(value)


def half_a_digit(text: str) -> float:
    """Half a unit of the last digit printed, which is what rounding explains: 5,000 for "1.33M", 0 for an integer.

    Raises:
        ValueError: as `number`.
    """
    digits, unit = _parted(text)
    exponent = int(digits.as_tuple().exponent)
    return 0.0 if unit == "" and exponent == 0 else float(Decimal(5).scaleb(exponent - 1) * UNITS[unit])


def _parted(text: str) -> tuple[Decimal, str]:
    unit = next(unit for unit in UNITS if text.endswith(unit))
    try:
        digits = Decimal(text.removesuffix(unit).replace(",", "")) if unit else Decimal(text.replace(",", ""))
    except InvalidOperation as reason:
        raise ValueError(f"{text!r} is not a printed number: expected digits, with %, M or GB behind them") from reason
    if not digits.is_finite():
        raise ValueError(f"{text!r} is not a finite number")
    return digits, unit
