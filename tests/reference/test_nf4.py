"""NF4 from first principles against bitsandbytes: table, codes, packing, scales and their second quantization."""

import pytest
import torch

from rankbits.quant import nf4

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

SIZES = [65, 128, 1000, 3 * 64 * 256 + 64]


@pytest.fixture(params=SIZES)
def weight(request) -> torch.Tensor:
    numbers = torch.randn(request.param, generator=torch.Generator().manual_seed(request.param))
    numbers[:3] *= 7.0
    return numbers


def test_the_table_is_theirs_to_the_last_bit() -> None:
    assert torch.equal(nf4.nf4_table(), functional.get_4bit_type("nf4", device="cpu"))


def test_the_table_of_the_scales_is_theirs_to_the_last_bit() -> None:
    assert torch.equal(nf4.dynamic_table(), functional.create_dynamic_map(signed=True).sort().values)


def test_codes_scales_and_values_are_theirs(weight) -> None:
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=nf4.BLOCK)
    mine = nf4.quantize(weight, nf4.nf4_table())
    assert torch.equal(mine.packed, packed.flatten())
    assert torch.equal(mine.scales, state.absmax)
    values = functional.dequantize_4bit(packed, state).flatten()
    assert torch.equal(nf4.dequantize(mine, nf4.nf4_table()), values)


def test_scales_in_eight_bits_are_theirs(weight) -> None:
    _, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=nf4.BLOCK, compress_statistics=True)
    mine = nf4.quantize_scales(nf4.quantize(weight, nf4.nf4_table()).scales)
    assert torch.equal(mine.codes, state.absmax)
    assert torch.equal(mine.outer, state.state2.absmax)
    assert torch.equal(mine.mean, state.offset)
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(nf4.dequantize_scales(mine), scales)
