"""Compression of a vector to the side of MoRA's square matrix, and decompression back: linear, without parameters.

Everything acts on the last dimension. Sharing (Jiang et al. 2024, Eq. 6) sums groups of entries on the way in and gives
one entry to all members of a group on the way out; truncation (Eq. 5) keeps the first entries. A group holds entries
that lie one side apart ("strided"), or neighbours ("adjacent").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_strided(x: Tensor, side: int) -> Tensor:
    """c_j = sum_i x_(i side + j mod n) over ceil(n / side) terms: [..., n] to [..., side], side <= n.

    The last, incomplete stretch goes on with the first entries, which thus count twice.
    """
    length = x.shape[-1]
    padding = -length % side
    if padding:
        x = torch.cat((x, x[..., :padding]), dim=-1)  # [..., ceil(n / side) side]
    stretches: Tensor = x.unflatten(-1, (-1, side))  # [..., ceil(n / side), side]
    return stretches.sum(dim=-2)


def sum_adjacent(x: Tensor, side: int) -> Tensor:
    """Sums of `side` groups of neighbours: [..., n] to [..., side], side <= n.

    The first n mod side groups have one entry more than the others, floor(n / side) + 1.
    """
    size, longer = divmod(x.shape[-1], side)
    split = longer * (size + 1)
    shorter: Tensor = x[..., split:].unflatten(-1, (side - longer, size)).sum(dim=-1)  # [..., side - n mod side]
    if not longer:
        return shorter
    first = x[..., :split].unflatten(-1, (longer, size + 1)).sum(dim=-1)  # [..., n mod side]
    return torch.cat((first, shorter), dim=-1)


def truncate(x: Tensor, side: int) -> Tensor:
    """The first entries: [..., n] to [..., side]."""
    return x[..., :side]


def tile(v: Tensor, length: int) -> Tensor:
    """y_i = v_(i mod side), the transpose of `sum_strided` but for the wrapped tail: [..., side] to [..., length]."""
    times = -(-length // v.shape[-1])
    return torch.cat([v] * times, dim=-1)[..., :length]


def tile_wrapped(v: Tensor, length: int) -> Tensor:
    """The transpose of `sum_strided`: [..., side] to [..., length], side <= length."""
    side = v.shape[-1]
    padding = -length % side
    tiled = tile(v, length)
    if not padding:
        return tiled
    # The first entries were also read as the end of the last stretch.
    return torch.cat((tiled[..., :padding] + v[..., side - padding :], tiled[..., padding:]), dim=-1)


def repeat_adjacent(v: Tensor, length: int) -> Tensor:
    """y_i = v_(group of i), groups as in `sum_adjacent`, whose transpose it is: [..., side] to [..., length]."""
    side = v.shape[-1]
    size, longer = divmod(length, side)
    first = v[..., :longer].repeat_interleave(size + 1, dim=-1)
    return torch.cat((first, v[..., longer:].repeat_interleave(size, dim=-1)), dim=-1)


def pad_with_zeros(v: Tensor, length: int) -> Tensor:
    """The given entries and zeros behind them, the transpose of `truncate`: [..., side] to [..., length]."""
    return F.pad(v, (0, length - v.shape[-1]))
