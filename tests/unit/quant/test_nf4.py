"""NF4: the published values, where ties go, and how much rounding can cost."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankbits.quant import nf4

# QLoRA, App. E.
PUBLISHED = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def test_the_table_is_the_published_one() -> None:
    assert nf4.nf4_table().tolist() == PUBLISHED


def test_codes_of_normal_numbers_are_used_about_equally_often() -> None:
    numbers = torch.randn(64 * 4096, generator=torch.Generator().manual_seed(0))
    stored = nf4.quantize(numbers, nf4.nf4_table())
    used = torch.bincount(torch.cat([stored.packed >> 4, stored.packed & 15]).long(), minlength=16) / len(numbers)
    uniform = torch.bincount(((numbers / 4).clamp(-1, 1) * 7.5 + 7.5).round().long(), minlength=16) / len(numbers)
    assert float(used.max()) < 0.11 < float(uniform.max())


def test_a_number_in_the_middle_goes_down() -> None:
    table = torch.arange(16.0) / 8 - 1
    block = torch.cat([torch.tensor([-1.0]), table[:-1] + 1 / 16])
    assert torch.equal(nf4.dequantize(nf4.quantize(block, table), table), torch.cat([table[:1], table[:-1]]))


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    weight[1, 3] = 5.0
    assert torch.equal(nf4.dequantize(nf4.quantize(weight, nf4.nf4_table()), nf4.nf4_table()), weight)


@given(st.integers(1, 200), st.integers(0, 2**16), st.floats(1e-3, 1e3))
def test_rounding_moves_a_number_by_half_the_widest_gap_at_most(size, seed, scale) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    table = nf4.nf4_table()
    stored = nf4.quantize(weight, table)
    assert len(stored.packed) == math.ceil(size / 2)
    error = (nf4.dequantize(stored, table) - weight).abs()
    largest = stored.scales.repeat_interleave(nf4.BLOCK)[:size]
    assert bool((error <= largest * float(table.diff().max()) / 2 * (1 + 1e-6)).all())


@pytest.mark.parametrize("size", [1, 255, 256, 700])
def test_eight_bits_keep_scales_to_a_few_percent_of_the_largest_distance_from_their_mean(size) -> None:
    scales = torch.rand(size, generator=torch.Generator().manual_seed(size)) + 0.5
    found = nf4.dequantize_scales(nf4.quantize_scales(scales))
    gap = float(nf4.dynamic_table().diff().max())
    assert float((found - scales).abs().max()) <= gap / 2 * float((scales - scales.mean()).abs().max()) + 1e-6


def test_a_weight_costs_4_127_bits_with_double_quantization() -> None:
    weight = torch.ones(64, 64 * 256)
    stored = nf4.quantize(weight, nf4.nf4_table())
    scales = nf4.quantize_scales(stored.scales)
    stored_bits = 8 * stored.packed.numel() + 8 * scales.codes.numel() + 32 * scales.outer.numel()
    assert stored_bits / weight.numel() == 4 + 8 / 64 + 32 / (64 * 256)
