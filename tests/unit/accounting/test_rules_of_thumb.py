"""The sums that lectures do, to the digit that they print."""

from __future__ import annotations

from rankbits.accounting.rules_of_thumb import GB, LLAMA3_8B, LOOSE, full_finetuning_bytes, loading_bytes, qlora_bytes


def test_the_lectures_sums() -> None:
    assert loading_bytes(LLAMA3_8B) == 32 * GB
    assert loading_bytes(LLAMA3_8B, 0.5) == 4 * GB
    assert full_finetuning_bytes(LLAMA3_8B) == 128 * GB
    assert qlora_bytes(LLAMA3_8B, 48_000_000) == 4.408 * GB
    assert loading_bytes(70 * GB) == 280 * GB
    assert len(LOOSE) == len(set(LOOSE)) == 9
