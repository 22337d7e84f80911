"""State that keeps float32 while the model around it is cast to half precision."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Float32State(nn.Module):
    """A module whose floating-point state keeps its precision when the model around it is cast.

    Gate logits and ranges move by less than the resolution of half precision in a step; only their device may change.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32State:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self
