"""How large MoRA's square matrix is: as many parameters as LoRA would have at a given rank."""

from __future__ import annotations

from enum import Enum
from math import isqrt


class Rounding(str, Enum):
    """How the root becomes a side: to the nearest integer (the paper's code), or down (the paper's formula)."""

    NEAREST = "nearest"
    FLOOR = "floor"


def square_side(r: int, in_features: int, out_features: int, *, rounding: Rounding, even: bool) -> int:
    """Side of the square matrix, sqrt(r (in_features + out_features)) rounded (Jiang et al. 2024, sec. 4).

    Args:
        r: rank of the LoRA that has as many parameters, at least 1.
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        rounding: FLOOR never has more parameters than LoRA, NEAREST may have some more.
        even: whether the side is then rounded down to an even number, which rotation needs.
    """
    parameters = r * (in_features + out_features)
    # floor(sqrt(n) + 1/2) = floor((floor(sqrt(4 n)) + 1) / 2): integers do not err near a half.
    side = isqrt(parameters) if rounding is Rounding.FLOOR else (isqrt(4 * parameters) + 1) // 2
    return side - side % 2 if even else side


def largest_rank(in_features: int, out_features: int, *, rounding: Rounding, even: bool) -> int:
    """The largest r whose side is at most the smaller side of the layer; 0 if there is none.

    Arguments are those of `square_side`.
    """
    most = min(in_features, out_features)
    if even:
        if most < 2:
            return 0
        most += most % 2 == 0  # one more is rounded down
    # isqrt(n) <= m if n < (m + 1)^2, and sqrt(n) < m + 1/2 if n <= m^2 + m.
    parameters = most * most + (2 * most if rounding is Rounding.FLOOR else most)
    return parameters // (in_features + out_features)
