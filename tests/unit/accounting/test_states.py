"""Bytes of optimizer states: fp32, 8-bit with scales, master copies and paging."""

from __future__ import annotations

import pytest

from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.states import optimizer_bytes


def settings(**changes: object) -> TrainingSettings:
    return TrainingSettings(**{"batch": 1, "sequence_length": 8, **changes})  # type: ignore[arg-type]


def test_adamw_has_two_states_of_the_weights_width() -> None:
    assert optimizer_bytes([100, 3], settings()) == (8 * 103, 0)
    assert optimizer_bytes([100, 3], settings(), weight_bytes=2) == (4 * 103, 0)


def test_master_copies_make_twelve_bytes_a_half_precision_weight() -> None:
    assert optimizer_bytes([100], settings(master_weights=True), weight_bytes=2) == (12 * 100, 0)
    assert optimizer_bytes([100], settings(master_weights=True)) == (8 * 100, 0)


def test_8_bit_states_have_two_scales_for_each_256_and_spare_small_tensors() -> None:
    assert optimizer_bytes([4096 + 1], settings(optimizer="adamw-8bit")) == (2 * 4097 + 2 * 17 * 4, 0)
    assert optimizer_bytes([4095], settings(optimizer="adamw-8bit")) == (8 * 4095, 0)


@pytest.mark.parametrize(
    ("size", "device", "expected"),
    [
        (100_000, "cuda", (2 * 391 * 4, 200_000)),
        (99_999, "cuda", (2 * 391 * 4 + 199_998, 0)),
        (100_000, "cpu", (2 * 391 * 4 + 200_000, 0)),
    ],
)
def test_large_states_are_paged_on_cuda_alone(size: int, device: str, expected: tuple[int, int]) -> None:
    assert optimizer_bytes([size], settings(optimizer="paged-adamw-8bit", device=device)) == expected
