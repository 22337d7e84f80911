"""MoRA's update, decompress(M compress(x)), as an output, as a weight, and where it has one as a LoRA pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from rankbits.tuners.mora.blocks import assembled, block_count, cut, join, rotate
from rankbits.tuners.mora.compress import (
    pad_with_zeros,
    repeat_adjacent,
    sum_adjacent,
    sum_strided,
    tile,
    tile_wrapped,
    truncate,
)

Operator = Callable[[Tensor, int], Tensor]
"""Maps the last dimension of a tensor to a given length."""


class MoraType(str, Enum):
    """What compresses and decompresses (Jiang et al. 2024, sec. 4), by the paper's names.

    Sharing comes in four kinds: groups of entries one side apart or of neighbours, for inputs and for outputs.
    """

    TRUNCATION = "truncation"
    SHARING = "sharing"
    SHARING_ADJACENT = "sharing_adjacent"
    SHARING_ADJACENT_INPUTS = "sharing_adjacent_inputs"
    SHARING_ADJACENT_OUTPUTS = "sharing_adjacent_outputs"
    DECOUPLING = "decoupling"
    ROTATION = "rotation"


NUMBERED: Mapping[int, MoraType] = {
    1: MoraType.SHARING,
    2: MoraType.SHARING_ADJACENT,
    3: MoraType.SHARING_ADJACENT_INPUTS,
    4: MoraType.SHARING_ADJACENT_OUTPUTS,
    6: MoraType.ROTATION,
}
"""The numbers that the paper's code gives to types; it has no 5, and none for truncation and decoupling."""
BLOCKWISE = frozenset({MoraType.DECOUPLING, MoraType.ROTATION})
"""Types that multiply every block of the input by the matrix, so that the update can have full rank."""


@dataclass(frozen=True, slots=True)
class Form:
    """Which linear map of M an update is.

    Args:
        kind: what compresses and decompresses.
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        side: of M, at most the smaller of both; even for rotation.
        fold: blockwise types add results beyond the outputs to the first outputs instead of cutting them off.
    """

    kind: MoraType
    in_features: int
    out_features: int
    side: int
    fold: bool = False

    @property
    def works_by_blocks(self) -> bool:
        """Whether M multiplies every block of the input."""
        # Compiled code is made anew where the identity of an enum differs, but not where its membership in a set does.
        return self.kind is MoraType.DECOUPLING or self.kind is MoraType.ROTATION

    @property
    def blocks(self) -> int:
        """How many blocks of the input M multiplies; 1 where the type has no blocks."""
        if not self.works_by_blocks:
            return 1
        return block_count(self.in_features, self.out_features, self.side, fold=self.fold)


@dataclass(frozen=True, slots=True)
class _Operators:
    """f_comp, its transpose, and f_decomp of a type without blocks."""

    compress: Operator
    spread: Operator
    expand: Operator


_OPERATORS: Mapping[MoraType, _Operators] = {
    MoraType.TRUNCATION: _Operators(truncate, pad_with_zeros, pad_with_zeros),
    MoraType.SHARING: _Operators(sum_strided, tile_wrapped, tile),
    MoraType.SHARING_ADJACENT: _Operators(sum_adjacent, repeat_adjacent, repeat_adjacent),
    MoraType.SHARING_ADJACENT_INPUTS: _Operators(sum_adjacent, repeat_adjacent, tile),
    MoraType.SHARING_ADJACENT_OUTPUTS: _Operators(sum_strided, tile_wrapped, repeat_adjacent),
}


def update_output(x: Tensor, matrix: Tensor, form: Form) -> Tensor:
    """f_decomp(M f_comp(x)) without forming the weight (Jiang et al. 2024, Eqs. 4 to 9).

    Args:
        x: [..., in_features].
        matrix: M, [side, side].
        form: which map.

    Returns:
        [..., out_features].
    """
    if form.works_by_blocks:
        blocks = cut(x, form.side, form.blocks)  # [..., blocks, side]
        if form.kind is MoraType.ROTATION:
            blocks = rotate(blocks)
        return join(F.linear(blocks, matrix), form.out_features, fold=form.fold)
    operators = _OPERATORS[form.kind]
    return operators.expand(F.linear(operators.compress(x, form.side), matrix), form.out_features)


def delta_weight(matrix: Tensor, form: Form) -> Tensor:
    """The weight that computes `update_output`: entries of M, or of the rotated M, copied to their places.

    Args:
        matrix: M, [side, side].
        form: which map.

    Returns:
        [out_features, in_features].
    """
    if form.works_by_blocks:
        matrices = matrix.expand(form.blocks, -1, -1)  # [blocks, side, side]
        if form.kind is MoraType.ROTATION:
            # Row i of M R_b is R_b^T m_i, which is m_i turned back.
            matrices = rotate(matrices.transpose(0, 1), inverse=True).transpose(0, 1)
        return assembled(matrices, form.in_features, form.out_features, fold=form.fold)
    operators = _OPERATORS[form.kind]
    rows = operators.spread(matrix, form.in_features)  # [side, in_features]
    return operators.expand(rows.T, form.out_features).T


def lora_factors(matrix: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """A and B with B A equal to the update's weight, for types that compress the whole input once.

    There f_comp(x) = P_in x and f_decomp(v) = P_out v, so the update P_out M P_in has at most the rank of M, and
    A = P_in, B = P_out M. With blocks the update is made of ceil(n / side) matrices M R_b side by side along the
    diagonal: its rank reaches min(in_features, out_features), and no smaller pair holds it.

    Args:
        matrix: M, [side, side].
        form: which map.

    Returns:
        A [side, in_features] and B [out_features, side], in the type of M.

    Raises:
        ValueError: the type works by blocks.
    """
    if form.works_by_blocks:
        raise ValueError(
            f"an update of type {form.kind.value!r} is no low-rank product: its {form.blocks} blocks of side "
            f"{form.side} reach rank {min(form.in_features, form.out_features)}, the whole rank of a "
            f"[{form.out_features}, {form.in_features}] weight; merge it, or train with one of "
            f"{sorted(kind.value for kind in _OPERATORS)}"
        )
    operators = _OPERATORS[form.kind]
    down = operators.spread(torch.eye(form.side, dtype=matrix.dtype, device=matrix.device), form.in_features)
    return down, operators.expand(matrix.T, form.out_features).T
