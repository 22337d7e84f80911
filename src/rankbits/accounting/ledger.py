"""Bytes of a pass: what is kept until the backward pass, and written, and what of that leaves holes in the heap."""

from __future__ import annotations

from dataclasses import dataclass

MMAP_THRESHOLD_MAX = 32 * 2**20
"""Blocks from here on get pages of their own from glibc, which go back when they are freed (malloc(3), mallopt(3))."""


@dataclass
class Ledger:
    """Running totals over blocks of bytes."""

    kept: int = 0
    kept_small: int = 0
    written_small: int = 0
    largest: int = 0

    def keep(self, *blocks: int) -> None:
        """Blocks that stay until the backward pass."""
        for block in blocks:
            self.kept += block
            self.kept_small += block if block < MMAP_THRESHOLD_MAX else 0

    def write(self, *blocks: int) -> None:
        """Blocks that the forward pass allocates, kept or not."""
        for block in blocks:
            self.largest = max(self.largest, block)
            self.written_small += block if block < MMAP_THRESHOLD_MAX else 0

    @property
    def temporary(self) -> int:
        """What is written and not kept, among blocks that glibc keeps in its heap."""
        return max(0, self.written_small - self.kept_small)
