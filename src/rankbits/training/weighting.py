"""What the bits of each quantizer are weighted by in the penalty."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypedDict

from rankbits.errors import ScheduleError


class PenaltyWeighting(str, Enum):
    """What a bit of a quantizer costs."""

    CONST = "const"
    """The same everywhere (the paper)."""
    BOP = "bop"
    """Its share of the bit operations (van Baalen et al. 2020)."""
    BYTE = "byte"
    """Its share of the stored bytes: nothing for activations."""


class PenaltyReduction(str, Enum):
    """Whether the penalties add up over all quantizers and layers (the paper) or are averaged."""

    SUM = "sum"
    MEAN = "mean"


class PenaltyOptions(TypedDict, total=False):
    """Keywords of `Penalty`."""

    weighting: str
    reduction: str


@dataclass(frozen=True)
class Penalty:
    """How the gates of a model are put together in R_q and R_r.

    Args:
        weighting: "const", "bop" or "byte".
        reduction: "sum" or "mean".

    Raises:
        ScheduleError: one of them is unknown.
    """

    weighting: PenaltyWeighting | str = PenaltyWeighting.CONST
    reduction: PenaltyReduction | str = PenaltyReduction.SUM

    def __post_init__(self) -> None:
        for name, kind in (("weighting", PenaltyWeighting), ("reduction", PenaltyReduction)):
            known = [member.value for member in kind]
            given = getattr(self, name)
            if given not in known:
                raise ScheduleError(f"{name}: given {given!r}, expected one of {', '.join(known)}")
            object.__setattr__(self, name, kind(given))
