"""How large MoRA's square matrix is in a layer, and how many blocks of the input it multiplies."""

from __future__ import annotations

from math import isqrt

from rankbits.accounting.spec import Linear, MethodSpec
from rankbits.errors import ModelError

ROTATION_BELOW = 64
"""MoRA rotates below this rank and shares groups from it on, where it is not told what to do."""
ROTATION, SHARING = "rotation", "sharing"
BLOCKWISE = ("decoupling", ROTATION)
"""Kinds that multiply every block of the input."""
NUMBERED = {
    1: SHARING,
    2: "sharing_adjacent",
    3: "sharing_adjacent_inputs",
    4: "sharing_adjacent_outputs",
    6: ROTATION,
}
"""The numbers that the code of Jiang et al. 2024 gives to kinds."""


def usual_kind(rank: int) -> str:
    """What compresses at a rank if nothing else is said."""
    return ROTATION if rank < ROTATION_BELOW else SHARING


def mora_kind(spec: MethodSpec) -> str:
    """What compresses and decompresses: the given kind, or the usual one."""
    return spec.mora.kind or usual_kind(spec.rank)


def mora_side(linear: Linear, spec: MethodSpec) -> int:
    """Side of MoRA's square matrix: floor(sqrt(r (d_in + d_out)) + 1/2), made even where it rotates.

    Jiang et al. 2024, with the rounding of their code, or floor(sqrt(r (d_in + d_out))) as in their text.

    Raises:
        ModelError: the matrix would be larger than the layer.
    """
    parameters = spec.rank * (linear.d_in + linear.d_out)
    # floor(sqrt(a) + 1/2) = floor((floor(sqrt(4 a)) + 1) / 2), in integers alone.
    side = isqrt(parameters) if spec.mora.floor else (isqrt(4 * parameters) + 1) // 2
    if mora_kind(spec) == ROTATION:
        side -= side % 2
    if side > min(linear.d_in, linear.d_out):
        raise ModelError(
            f"rank {spec.rank}: MoRA's matrix in {linear.name} would have side {side}, expected at most "
            f"{min(linear.d_in, linear.d_out)}, the smaller side of its [{linear.d_out}, {linear.d_in}] weight"
        )
    return side


def mora_blocks(linear: Linear, spec: MethodSpec) -> int:
    """Blocks of one input row that MoRA's matrix multiplies: those that reach an output, or all if it folds; else 1.

    Raises:
        ModelError: the matrix would be larger than the layer.
    """
    side = mora_side(linear, spec)
    if mora_kind(spec) not in BLOCKWISE:
        return 1
    return -(-(linear.d_in if spec.mora.fold else min(linear.d_in, linear.d_out)) // side)
