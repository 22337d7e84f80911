"""Which rows or columns of a matrix each task gets: stretches of one random order, so that no two tasks meet."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch


def random_order(size: int, *, seed: int, layer: str) -> list[int]:
    """All of 0..size-1 in the random order of one layer.

    It depends on nothing but the arguments: not on the global random state, nor on the layers visited before.

    Args:
        size: how many rows or columns the matrix has.
        seed: of the choice.
        layer: qualified name of the layer; layers of one model get unrelated orders.
    """
    digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
    # 63 bits, which no integer type takes for a negative number.
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    order: list[int] = torch.randperm(size, generator=generator, device="cpu").tolist()
    return order


def allocate(
    ranks: Mapping[str, int],
    size: int,
    *,
    seed: int,
    layer: str,
    first: int = 0,
    taken: Collection[int] = (),
) -> dict[str, list[int]]:
    """Share the rows or columns of one matrix among tasks: disjoint sets, uniform without replacement.

    One random order is cut into consecutive stretches (Multi-SBoRA, after Po et al. 2024). Giving tasks their share
    one by one, with the shares before as `taken`, gives what giving all at once would.

    Args:
        ranks: how many each task gets, in the order in which tasks are served.
        size: how many there are.
        seed: of the random order.
        layer: qualified name of the layer the matrix is in.
        first: place in the random order before which nothing is given away.
        taken: indices that belong to others.

    Returns:
        The indices in [0, size) of each task, in the order of the rows or columns that it trains.

    Raises:
        ValueError: a rank is below 1 or larger than the matrix, or a task does not fit into what is left.
    """
    others = set(taken)
    free = [index for index in random_order(size, seed=seed, layer=layer)[first:] if index not in others]
    shares: dict[str, list[int]] = {}
    for task, rank in ranks.items():
        if not 1 <= rank <= size:
            raise ValueError(
                f"`r`={rank} of {task!r} does not fit {layer!r}, which has {size} rows or columns to choose from: "
                f"1 <= r <= {size}"
            )
        if rank > len(free):
            raise ValueError(
                f"{task!r} asks for r={rank} rows or columns of {layer!r}, of which {len(free)} are left: of {size}, "
                f"{len(others)} belong to other tasks and the order is read from place {first}. Give it a smaller r"
                f"{', or delete another task' if others else ''}{', or an earlier `first`' if first else ''}"
            )
        shares[task], free = free[:rank], free[rank:]
        others.update(shares[task])
    return shares
