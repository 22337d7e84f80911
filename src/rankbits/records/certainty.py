"""How certain a learned rank or width is: which gates decide it, and how far each is from its threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

GATED_WIDTHS = (4, 8, 16, 32)
"""Bits that the gates of a width open, in the order of their chain; 2 are always on."""
SAMPLED_THRESHOLD = 0.66
"""A sampled gate is on at inference iff its probability of being open exceeds this (Bayesian-LoRA, Alg. 2)."""
ROUNDED_THRESHOLD = 0.5
"""A straight-through gate is on iff the product of probabilities up to it rounds to one (Bayesian-LoRA, Alg. 1)."""
NEAR = 0.1
"""A gate this close to its threshold, in probability, might as well have fallen to the other side."""
RANK = "rank"
STRAIGHT_THROUGH = "ste"


@dataclass(frozen=True, slots=True)
class DecidingGate:
    """A gate that decides a rank or a width: all gates before it in its chain are on.

    Args:
        site: name of the quantizer whose width it decides; "rank" for a rank.
        level: bits, or rank, that there are if it is on.
        probability: of being open; for straight-through rank gates the product of probabilities that is rounded.
        threshold: it is on above this.
    """

    site: str
    level: int
    probability: float
    threshold: float

    @property
    def is_open(self) -> bool:
        """Whether it is on at inference."""
        return self.probability > self.threshold

    @property
    def margin(self) -> float:
        """Distance of the probability from the threshold, 0 to 1."""
        return abs(self.probability - self.threshold)

    @property
    def is_near(self) -> bool:
        """Whether it is so close to its threshold that it might as well have fallen to the other side."""
        return self.margin < NEAR

    @property
    def text(self) -> str:
        """What it decides and how clearly: "weight at 8 bits, open with 0.69 (on above 0.66)"."""
        level = f"rank {self.level}" if self.site == RANK else f"{self.site} at {self.level} bits"
        return f"{level}, open with {self.probability:.2f} (on above {self.threshold:.2f})"


def marginals(open_probabilities: Sequence[float]) -> list[float]:
    """Probability that each gate of a chain and all before it are open, from those of the single gates."""
    return list(accumulate(open_probabilities, mul))


def width_gates(site: str, open_probabilities: Sequence[float]) -> list[DecidingGate]:
    """The gates that decide a width: those that are on, and the first one that is off.

    Args:
        site: name of the quantizer.
        open_probabilities: of its gates of 4, 8, 16 and 32 bits, each on its own.
    """
    levels = zip(GATED_WIDTHS, open_probabilities, strict=False)
    return list(_deciding(DecidingGate(site, bits, p, SAMPLED_THRESHOLD) for bits, p in levels))


def rank_gates(open_probabilities: Sequence[float], rank_gate: str) -> list[DecidingGate]:
    """The gates that decide a rank: those that are on, and the first one that is off.

    Args:
        open_probabilities: of the gates of ranks 2, 3 and so on, each on its own.
        rank_gate: "ste" or "hard_concrete".
    """
    rounded = rank_gate == STRAIGHT_THROUGH
    threshold = ROUNDED_THRESHOLD if rounded else SAMPLED_THRESHOLD
    compared = marginals(open_probabilities) if rounded else open_probabilities
    return list(_deciding(DecidingGate(RANK, rank, p, threshold) for rank, p in enumerate(compared, start=2)))


def _deciding(chain: Iterator[DecidingGate]) -> Iterator[DecidingGate]:
    for gate in chain:
        yield gate
        if not gate.is_open:
            return
