"""MoRA by blocks: one square matrix on each stretch of the input, told apart by a rotation.

Decoupling (Jiang et al. 2024, Eq. 8) cuts the input into blocks as long as the matrix is wide, multiplies each of them
and puts the results one behind the other; rotation (Eq. 9) first turns block b by its own angles, those of rotary
position embeddings (Su et al. 2021) at position b.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROTARY_BASE = 10_000.0


def block_count(in_features: int, out_features: int, side: int, *, fold: bool) -> int:
    """How many blocks are multiplied: all ceil(in_features / side), or those alone that reach an output.

    Args:
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        side: entries of a block.
        fold: whether results beyond the outputs are added to the first ones instead of being cut off.
    """
    blocks = -(-in_features // side)
    return blocks if fold else min(blocks, -(-out_features // side))


def cut(x: Tensor, side: int, count: int) -> Tensor:
    """The first blocks of x, which goes on with its first entries where it ends: [..., n] to [..., count, side].

    Args:
        x: [..., n] with n >= side.
        side: entries of a block.
        count: at most ceil(n / side).
    """
    length, needed = x.shape[-1], count * side
    x = x[..., :needed] if needed <= length else torch.cat((x, x[..., : needed - length]), dim=-1)
    blocks: Tensor = x.unflatten(-1, (count, side))
    return blocks


def rotate(blocks: Tensor, *, inverse: bool = False) -> Tensor:
    """R_b applied to block b: [..., count, side] to the same.

    With h = side / 2 and theta_k = b 10000^(-2 k / side) for k < h, entries k and k + h of the block turn together:
    (x_k cos - x_(k+h) sin, x_(k+h) cos + x_k sin).

    Args:
        blocks: [..., count, side] with an even side.
        inverse: turn by the negative angles, which is the transpose.
    """
    count, side = blocks.shape[-2:]
    half = side // 2
    # Angles in half precision would turn far blocks by another amount than merging assumes.
    exact = torch.promote_types(blocks.dtype, torch.float32)
    exponents = torch.arange(half, dtype=exact, device=blocks.device) * (-2 / side)  # [half]
    positions = torch.arange(count, dtype=exact, device=blocks.device)
    angles = positions[:, None] * torch.pow(ROTARY_BASE, exponents)  # [count, half]
    cos, sin = angles.cos().to(blocks.dtype), angles.sin().to(blocks.dtype)
    if inverse:
        sin = -sin
    first, second = blocks[..., :half], blocks[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def join(blocks: Tensor, length: int, *, fold: bool) -> Tensor:
    """Blocks one behind the other, tiled or cut to the length: [..., count, side] to [..., length].

    Args:
        blocks: [..., count, side].
        length: entries of the result.
        fold: add what lies beyond the length to the first entries, entry j to j mod length, instead of cutting it off.
    """
    y = blocks.flatten(-2)  # [..., count side]
    given = y.shape[-1]
    if given < length:
        return torch.cat([y] * -(-length // given), dim=-1)[..., :length]
    if fold and given > length:
        stretches: Tensor = F.pad(y, (0, -given % length)).unflatten(-1, (-1, length))
        return stretches.sum(dim=-2)
    return y[..., :length]


def assembled(matrices: Tensor, in_features: int, out_features: int, *, fold: bool) -> Tensor:
    """The matrix of cutting, multiplying and joining: [count, side, side] to [out_features, in_features].

    Args:
        matrices: what each block is multiplied by.
        in_features: entries of what is cut.
        out_features: entries of what is joined.
        fold: as in `join`.
    """
    count, side, _ = matrices.shape
    made = count * side
    rows = torch.arange(max(made, out_features) if fold else out_features, device=matrices.device)
    source = rows % made  # the row of a block that each row of the result is made of
    starts = torch.div(source, side, rounding_mode="floor") * side
    columns = (starts[:, None] + torch.arange(side, device=matrices.device)) % in_features  # [rows, side]
    result = matrices.new_zeros(out_features, in_features)
    return result.index_put_(((rows % out_features)[:, None], columns), matrices.flatten(0, 1)[source], accumulate=True)
