"""Where a tensor comes from: a weight, this call's input, a quantizer, a softmax.

What is known belongs to the memory that holds the numbers, so that every view of it knows the same. Operations hand it
on: those that only move numbers, or scale them by one constant, keep a width; all others lose it, and lost is 32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

WIDEST = 32
"""Bits of whatever is not known to be narrower."""

SOFTMAX = frozenset({"_softmax", "_safe_softmax", "_log_softmax"})
MOVES = frozenset(
    {
        "_to_copy",
        "_unsafe_view",
        "cat",
        "clone",
        "constant_pad_nd",
        "contiguous",
        "flip",
        "gather",
        "index",
        "index_select",
        "neg",
        "repeat",
        "roll",
        "stack",
        "unsqueeze",
    }
)
"""Numbers change place, dtype or sign, no more."""
SCALES = frozenset({"mul", "div"})
"""Moves, if the other operand is one constant."""
ELEMENTWISE = frozenset(
    {"add", "sub", "rsub", "mul", "div", "masked_fill", "where", "nan_to_num", "clamp", "tanh", "maximum", "minimum"}
)
"""What lies between scores and their softmax, and between the parts of a weight and the weight."""

LASTING = frozenset({"p", "h"})
"""Names that survive a mask or a diagonal."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What is known of the numbers in one piece of memory.

    Args:
        name: as an operand: x, h (between A and B), W0, A, E, B, q, k, v, p, pos_k, pos_q, identity.
        bits: width of the grid they lie on.
        tainted: whether they depend on this call's input.
        weight: qualified name of the parameter they are, or are made of.
        scores: indices of the products they are sums of, until a softmax reads them.
    """

    name: str = "x"
    bits: int = WIDEST
    tainted: bool = False
    weight: str | None = None
    scores: frozenset[int] = frozenset()


UNKNOWN = Mark()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def dtype_bits(tensor: Tensor) -> int:
    """Width of the numbers as they are held, 8 to 32."""
    return max(8, min(WIDEST, 8 * tensor.dtype.itemsize))


class Provenance:
    """Marks of all memory that one pass touched. Weak references keep its addresses from being used again."""

    def __init__(self) -> None:
        self._marks: dict[StorageWeakRef, Mark] = {}
        # Several parameters may be slices of one piece of memory.
        self._parameters: dict[StorageWeakRef, list[tuple[range, Mark]]] = {}

    def add_parameter(self, parameter: Tensor, mark: Mark) -> None:
        """Remember a parameter; every view of it is that parameter."""
        start = parameter.storage_offset()
        place = (range(start, start + max(1, parameter.numel())), mark)
        self._parameters.setdefault(_key(parameter), []).append(place)

    def put(self, tensor: Tensor, mark: Mark) -> None:
        """Remember what is known of a tensor's memory."""
        self._marks[_key(tensor)] = mark

    def of(self, tensor: Tensor) -> Mark:
        """What is known of a tensor."""
        key = _key(tensor)
        for place, mark in self._parameters.get(key, ()):
            if tensor.storage_offset() in place:
                return mark
        return self._marks.get(key, UNKNOWN)

    def is_tainted(self, values: Any) -> bool:
        """Whether any tensor in nested values depends on this call's input."""
        return any(self.of(tensor).tainted for tensor in tensors_in(values))

    def derive(self, name: str, operands: Sequence[Tensor], results: Iterable[Tensor]) -> None:
        """Hand on what is known through an operation that is no matrix product.

        Args:
            name: `short_name` of the operation.
            operands: the tensors it reads, in the order of its arguments.
            results: what it wrote; where that is a part of some memory, the rest of it stays as it was.
        """
        marks = [self.of(operand) for operand in operands]
        tainted = any(mark.tainted for mark in marks)
        for result in results:
            mark = _derived(name, operands, marks, result, tainted)
            before = self._marks.get(_key(result))
            self.put(result, mark if before is None or _is_whole(result) else _joined(before, mark))


def _key(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _is_whole(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()


def _joined(one: Mark, other: Mark) -> Mark:
    """What is known of memory that holds numbers of both."""
    return Mark(
        one.name if one.name == other.name else UNKNOWN.name,
        max(one.bits, other.bits),
        one.tainted or other.tainted,
        one.weight if one.weight == other.weight else None,
        one.scores | other.scores,
    )


def _derived(name: str, operands: Sequence[Tensor], marks: list[Mark], result: Tensor, tainted: bool) -> Mark:
    if name in SOFTMAX:
        return Mark("p", tainted=tainted)
    if name == "eye":
        return Mark("identity")
    if name == "copy":
        # The first operand is where the second is written to.
        return marks[-1]
    if name in MOVES and marks:
        parts = [mark for mark, operand in zip(marks, operands, strict=True) if operand.numel()] or marks
        first = parts[0]
        bits = max(mark.bits for mark in parts) if name in {"cat", "stack"} else first.bits
        return replace(first, bits=bits, tainted=tainted)
    if name in SCALES and marks and all(_is_constant(o, m) for o, m in zip(operands[1:], marks[1:], strict=True)):
        return replace(marks[0], tainted=tainted)
    if name in ELEMENTWISE and marks:
        return _combined(operands, marks, result, tainted)
    return Mark(tainted=tainted)


def _is_constant(operand: Tensor, mark: Mark) -> bool:
    return operand.dim() == 0 and not mark.tainted


def _combined(operands: Sequence[Tensor], marks: list[Mark], result: Tensor, tainted: bool) -> Mark:
    scores = frozenset[int]().union(*(mark.scores for mark in marks))
    for operand, mark in zip(operands, marks, strict=True):
        if mark.name in LASTING:
            return Mark(mark.name, tainted=tainted, scores=scores)
        if mark.weight is not None and not tainted and operand.shape == result.shape and operand.dim() >= 2:
            return Mark(mark.name, weight=mark.weight)
    return Mark(tainted=tainted, scores=scores)


def shares_memory(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether a tensor is a view of one of the others."""
    storage = tensor.untyped_storage()._cdata
    return any(other.untyped_storage()._cdata == storage for other in others)
