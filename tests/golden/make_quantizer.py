"""Golden values of the residual quantizer in exact rational arithmetic, from the papers and without the package.

Run `python tests/golden/make_quantizer.py` to print the contents of quantizer.json. Inputs are dyadic fractions, exact
in floating point; a quotient is a tie only at the edges of a signed range, where the clamp decides.
"""

import json
from fractions import Fraction

GATES = (
    ("0", "0", "0", "0"),
    ("1", "0", "0", "0"),
    ("1", "1", "0", "0"),
    ("1", "1", "1", "0"),
    ("1", "1", "1", "1"),
    ("3/4", "1/2", "1/8", "5/8"),
    ("1/4", "0", "1", "1/2"),
)
RANGES = ("3/2", "5/16")
# Multiples of the range: inside, at the edges, and outside.
POSITIONS = ("0", "1/1024", "3/16", "-5/16", "1/4", "13/32", "-37/64", "7/8", "1", "-1", "5/4", "-3", "1023/2048")


def nearest_even(value: Fraction) -> int:
    return round(value)


def clamp(value: Fraction | int, low: Fraction | int, high: Fraction | int) -> Fraction:
    return Fraction(min(max(value, low), high))


def codes(x: Fraction, beta: Fraction, bits: int, *, signed: bool) -> int:
    """Nearest code of the flat grid of one width."""
    step = (2 if signed else 1) * beta / (2**bits - 1)
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return int(clamp(nearest_even(x / step), -high if signed else 0, high))


def quantize(x: Fraction, beta: Fraction, gates: list[Fraction], *, signed: bool) -> tuple[Fraction, list[Fraction]]:
    """Value on the gated grid and the four residuals."""
    clipped = clamp(x, -beta if signed else 0, beta)
    step = (2 if signed else 1) * beta / 3
    total = step * clamp(nearest_even(clipped / step), -1 if signed else 0, 1 if signed else 3)
    result, link, residuals = total, Fraction(1), []
    for width, gate in zip((4, 8, 16, 32), gates, strict=True):
        step = step / (2 ** (width // 2) + 1)
        bound = 2 ** (width // 2 - 1)
        residuals.append(step * clamp(nearest_even((clipped - total) / step), -bound, bound))
        total += residuals[-1]
        link *= gate
        result += link * residuals[-1]
    return result, residuals


def case(position: Fraction, beta: Fraction, gates: tuple[str, ...], *, signed: bool) -> dict:
    x = position * beta
    value, residuals = quantize(x, beta, [Fraction(g) for g in gates], signed=signed)
    inside = (-beta if signed else 0) <= x <= beta
    return {
        "x": float(x),
        "range": float(beta),
        "gates": [float(Fraction(g)) for g in gates],
        "signed": signed,
        "value": float(value),
        "residuals": [float(r) for r in residuals],
        "grad_x": float(inside),
        "grad_range": float((value - (x if inside else 0)) / beta),
        "codes": {str(b): codes(x, beta, b, signed=signed) for b in (2, 4, 8, 16)},
    }


def golden() -> list[dict]:
    return [
        case(Fraction(position), Fraction(beta), gates, signed=signed)
        for signed in (True, False)
        for beta in RANGES
        for gates in GATES
        for position in POSITIONS
    ]


if __name__ == "__main__":
    print("[\n" + ",\n".join(json.dumps(entry) for entry in golden()) + "\n]")
