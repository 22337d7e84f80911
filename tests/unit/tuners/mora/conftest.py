"""The formulas of MoRA's paper written entry by entry, and layers of every type."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _sharing_inputs(side: int, n: int, *, adjacent: bool) -> Tensor:
    """P_in [side, n], how often each input is part of each sum."""
    matrix = torch.zeros(side, n, dtype=torch.float64)
    if adjacent:
        for i, group in enumerate(_groups(side, n)):
            matrix[group, i] = 1
        return matrix
    for place in range(math.ceil(n / side) * side):
        matrix[place % side, place % n] += 1
    return matrix


def _groups(side: int, n: int) -> list[int]:
    """The group of each of n neighbours: the first n mod side groups are one longer."""
    sizes = [n // side + (group < n % side) for group in range(side)]
    return [group for group, size in enumerate(sizes) for _ in range(size)]


def _sharing_outputs(side: int, n: int, *, adjacent: bool) -> Tensor:
    """P_out [n, side], with a single one per row."""
    matrix = torch.zeros(n, side, dtype=torch.float64)
    for i in range(n):
        matrix[i, _groups(side, n)[i] if adjacent else i % side] = 1
    return matrix


def _blockwise(matrix: Tensor, out_features: int, in_features: int, *, turns: bool, fold: bool) -> Tensor:
    """Output by output: row i of the concatenation is row i mod side of M R_b in block b = i // side."""
    side = len(matrix)
    blocks, half = math.ceil(in_features / side), side // 2
    made = blocks * side
    weight = torch.zeros(out_features, in_features, dtype=torch.float64)
    for place in range(max(made, out_features)):
        if place >= out_features and not fold:
            break
        block, row = divmod(place % made, side)
        rotation = torch.eye(side, dtype=torch.float64)
        if turns:
            for k in range(half):
                angle = block * 10000 ** (-2 * k / side)
                rotation[k, k] = rotation[k + half, k + half] = math.cos(angle)
                rotation[k, k + half], rotation[k + half, k] = -math.sin(angle), math.sin(angle)
        for column, value in enumerate(matrix[row] @ rotation):
            weight[place % out_features, (block * side + column) % in_features] += value
    return weight


def _weight(kind: str, matrix: Tensor, out_features: int, in_features: int, *, fold: bool = False) -> Tensor:
    side = len(matrix)
    matrix = matrix.detach().double()
    if kind in {"rotation", "decoupling"}:
        return _blockwise(matrix, out_features, in_features, turns=kind == "rotation", fold=fold)
    if kind == "truncation":
        weight = torch.zeros(out_features, in_features, dtype=torch.float64)
        weight[:side, :side] = matrix
        return weight
    adjacent = {
        "sharing": (False, False),
        "sharing_adjacent": (True, True),
        "sharing_adjacent_inputs": (True, False),
        "sharing_adjacent_outputs": (False, True),
    }[kind]
    inputs = _sharing_inputs(side, in_features, adjacent=adjacent[0])
    return _sharing_outputs(side, out_features, adjacent=adjacent[1]) @ matrix @ inputs


@pytest.fixture(scope="session")
def dense_update() -> Callable[..., Tensor]:
    """The weight [out, in] of an update in float64, from the paper's formulas with dense matrices."""
    return _weight
