"""Running totals of bytes, by what becomes of a block."""

from __future__ import annotations

from rankbits.accounting.ledger import MMAP_THRESHOLD_MAX, Ledger


def test_the_ledger_tells_large_blocks_from_small() -> None:
    ledger = Ledger()
    ledger.write(100, MMAP_THRESHOLD_MAX, 50)
    ledger.keep(30, MMAP_THRESHOLD_MAX)
    assert (ledger.kept, ledger.temporary, ledger.largest) == (30 + MMAP_THRESHOLD_MAX, 120, MMAP_THRESHOLD_MAX)
