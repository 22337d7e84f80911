"""Elements that a pass writes outside matrix products, summed, and what of them the options ask for."""

from __future__ import annotations

from dataclasses import dataclass

from rankbits.records import CountOptions, ElementWork


@dataclass(frozen=True, slots=True)
class Written:
    """A kind of work.

    Args:
        module: name of the module that does it.
        op: short name of the operation.
        head: whether the output embedding of a language model does it.
        constant: whether a cache could hold the result, because it does not depend on the input.
    """

    module: str
    op: str
    head: bool = False
    constant: bool = False


class WorkSums:
    """Elements written by kinds of work."""

    def __init__(self) -> None:
        self._sums: dict[Written, int] = {}

    def add(self, kind: Written, elements: int) -> None:
        """Count elements that were written."""
        self._sums[kind] = self._sums.get(kind, 0) + elements

    def asked(self, options: CountOptions, head_rows: int) -> list[ElementWork]:
        """The work that the options ask for, by module and operation.

        Args:
            options: positions "cached" leave out what a cache could hold; the head's work follows `head`.
            head_rows: positions of all sequences that the head ran on.
        """
        found: dict[tuple[str, str], int] = {}
        for kind, elements in self._sums.items():
            kept = elements
            if kind.head and options.head == "last" and not kind.constant:
                kept = elements * options.batch // head_rows if head_rows else elements
            if (kind.head and options.head == "out") or (kind.constant and options.positions == "cached"):
                kept = 0
            found[kind.module, kind.op] = found.get((kind.module, kind.op), 0) + kept
        return [ElementWork(module=module, op=op, elements=count) for (module, op), count in found.items() if count]
