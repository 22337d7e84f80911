"""Work done once and used again: an input that several layers read, and a weight that stands still."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class SharedResult:
    """What was made of a tensor, handed to each reader of that tensor once; then it is forgotten.

    A reader that asks again, or asks in another mode, gets a new result: the pass of the first one is over.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._mode: tuple[Any, ...] | None = None
        self._source: Tensor | None = None
        self._result: Tensor | None = None
        self._served: set[int] = set()

    def get(self, x: Tensor, reader: int, readers: int, make: Callable[[], Tensor]) -> Tensor:
        """The result for `x`.

        Args:
            x: the tensor that is read; it is known again by identity.
            reader: identity of the reader.
            readers: how many there are; after the last one nothing is kept.
            make: makes the result.
        """
        if readers < 2 or torch.compiler.is_compiling():
            return make()
        version = 0 if x.is_inference() else x._version
        mode = (torch.is_grad_enabled(), version, torch.is_autocast_enabled(x.device.type))
        if self._source is not x or self._mode != mode or reader in self._served or self._result is None:
            self._clear()
            self._source, self._mode, self._result = x, mode, make()
        self._served.add(reader)
        result = self._result
        if len(self._served) == readers:
            self._clear()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedResult:
        return SharedResult()

    def __reduce__(self) -> tuple[type[SharedResult], tuple[()]]:
        return SharedResult, ()


class Rounded:
    """The rounded form of tensors that stand still, made again once any of them was written."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._value: Tensor | None = None

    def get(self, sources: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes of the sources, which must need no gradient; kept until one of them changes."""
        if torch.compiler.is_compiling() or any(source.is_inference() for source in sources):
            return make()
        key = tuple((id(s), s.data_ptr(), s._version, s.dtype) for s in sources)
        if self._key != key or self._value is None:
            self._key, self._value = key, make()
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> Rounded:
        return Rounded()

    def __reduce__(self) -> tuple[type[Rounded], tuple[()]]:
        return Rounded, ()
