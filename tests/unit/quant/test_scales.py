"""Scales in half precision and E4M3: what is stored is what runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankbits.quant.codes import codes, step_at
from rankbits.quant.fixed_quantizer import FixedQuantizer
from rankbits.quant.grid import Granularity, RangeLayout, bits_of_gates
from rankbits.quant.quantizer import Quantizer
from rankbits.quant.scales import OCTAVES, SCALE_BITS, headroom, stored_ranges, stored_steps

NARROW = (16, 8)
FORMATS = {16: (torch.float16, 15), 8: (torch.float8_e4m3fn, 7)}
"""Type of each width, and the exponent of its highest octave that is complete."""
GATES = {2: torch.zeros(4, dtype=torch.bool), 4: torch.tensor([True, False, False, False])}


@pytest.fixture
def steps() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    magnitudes = torch.randn(64, 8, generator=generator).mul(2.0).exp() * 0.01
    return magnitudes * torch.where(torch.rand(64, 8, generator=generator) < 0.5, -1.0, 1.0)


@pytest.mark.parametrize("scale_bits", NARROW)
def test_steps_are_numbers_of_their_format_times_a_power_of_two(steps: Tensor, scale_bits: int) -> None:
    dtype, highest = FORMATS[scale_bits]
    found = stored_steps(steps, scale_bits)
    factor = torch.exp2(torch.floor(torch.log2(found.abs().max())) - highest)
    assert torch.equal((found / factor).to(dtype).to(torch.float32) * factor, found)
    # Within the normal numbers they are what casting to that format gives.
    normal = steps.abs() >= factor * torch.finfo(dtype).tiny
    assert int(normal.sum()) > 400
    assert torch.equal(found[normal], ((steps / factor).to(dtype).to(torch.float32) * factor)[normal])


@pytest.mark.parametrize("scale_bits", NARROW)
def test_what_is_too_small_for_the_largest_step_is_held_at_the_least_normal_number(scale_bits: int) -> None:
    least = 2.0 ** (1 - OCTAVES[scale_bits])
    given = torch.tensor([1.0, least, -least, least / 3, -least / 1000, torch.finfo(torch.float32).tiny])
    assert stored_steps(given, scale_bits).tolist() == [1.0, least, -least, least, -least, least]


def test_ties_go_to_even_and_into_the_next_octave() -> None:
    given = torch.tensor([17 / 16, 19 / 16, 31 / 16, -31 / 16, 1.0])
    assert stored_steps(given, 8).tolist() == [1.0, 1.25, 2.0, -2.0, 1.0]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale_bits", NARROW)
def test_ranges_have_the_stored_steps_and_stay_as_they_are_once_stored(
    steps: Tensor, scale_bits: int, bits: int, signed: bool
) -> None:
    found = stored_ranges(steps, bits, scale_bits, signed=signed)
    assert torch.equal(
        step_at(found, bits, signed=signed), stored_steps(step_at(steps, bits, signed=signed), scale_bits)
    )
    assert torch.equal(stored_ranges(found, bits, scale_bits, signed=signed), found)
    assert torch.equal(stored_ranges(steps, torch.tensor(bits), scale_bits, signed=signed), found)
    assert torch.equal(stored_ranges(-steps, bits, scale_bits, signed=signed), -found)
    assert torch.equal(stored_ranges(4.0 * steps, bits, scale_bits, signed=signed), 4.0 * found)
    assert torch.equal(stored_ranges(steps, bits, 32, signed=signed), steps)


def test_the_gradient_goes_straight_through(steps: Tensor) -> None:
    leaf, gradient = steps.requires_grad_(), torch.randn_like(steps)
    stored_ranges(leaf, 2, 8).backward(gradient)
    assert torch.equal(leaf.grad, gradient)


def _fitted(weight: Tensor, bits: int, scale_bits: int) -> Quantizer:
    layout = RangeLayout(Granularity.GROUP, 8, scale_bits)
    quantizer = Quantizer(calibration_passes=0, layout=layout, shape=tuple(weight.shape), compensated=True, full=True)
    quantizer.calibrate_to(weight)
    quantizer.fit(weight, bits)
    return quantizer


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_a_weight_is_its_codes_times_steps_that_can_be_stored(scale_bits: int, bits: int) -> None:
    weight = torch.randn(32, 24, generator=torch.Generator().manual_seed(4))
    quantizer = _fitted(weight, bits, scale_bits)
    quantizer.compensate(weight, bits, torch.eye(24) + 0.5)
    found = quantizer.rounded(weight, GATES[bits])
    step = step_at(quantizer.range_at(bits_of_gates(GATES[bits])), bits).detach()
    if scale_bits != 32:
        assert torch.equal(stored_steps(step, scale_bits), step)
    parts = quantizer.layout.parts(found)
    assert torch.equal(codes(parts, step, bits, full=True) * step, parts)
    fixed = FixedQuantizer(bits, layout=quantizer.layout, shape=(32, 24), compensated=True, full=True)
    fixed.fixed_range, fixed.offsets = quantizer.range_at(bits).detach(), quantizer.offsets
    assert torch.equal(fixed(weight), found)


@pytest.mark.parametrize("scale_bits", SCALE_BITS)
def test_codes_make_up_for_each_other_on_the_steps_that_are_stored(scale_bits: int) -> None:
    generator = torch.Generator().manual_seed(4)
    weight, inputs = torch.randn(32, 24, generator=generator), torch.randn(200, 24, generator=generator)
    moment = inputs.T @ inputs + 40.0
    # At 8 bits the fit leaves a range between two that can be stored.
    quantizer, gates = _fitted(weight, 8, scale_bits), torch.tensor([True, True, False, False])
    errors = []
    for _ in range(2):
        change = (quantizer.rounded(weight, gates) - weight).detach()
        errors.append(float(((change @ moment) * change).sum()))
        quantizer.compensate(weight, 8, moment)
    assert errors[1] < 0.9 * errors[0]


@torch.no_grad()
def _error(quantizer: Quantizer, weight: Tensor, bits: int) -> float:
    return float((quantizer.rounded(weight, GATES[bits]) - weight).square().sum())


@pytest.mark.parametrize("bits", [2, 4])
def test_narrow_scales_cost_little_because_the_fit_knows_them(bits: int) -> None:
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(5))
    fitted = {scale_bits: _fitted(weight, bits, scale_bits) for scale_bits in SCALE_BITS}
    unaware = _fitted(weight, bits, 32)
    with torch.no_grad():
        unaware.log_range.copy_(stored_ranges(unaware.range_, bits, 8).abs().log())
    errors = {scale_bits: _error(quantizer, weight, bits) for scale_bits, quantizer in fitted.items()}
    assert errors[32] <= errors[8] < _error(unaware, weight, bits)
    assert errors[16] < 1.001 * errors[32]


@pytest.mark.parametrize("open_gates", [2, 3, 4])
@pytest.mark.parametrize("scale_bits", NARROW)
def test_before_the_fit_nothing_is_clipped(scale_bits: int, open_gates: int) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(6))
    layout = RangeLayout(Granularity.GROUP, 8, scale_bits)
    quantizer = Quantizer(calibration_passes=0, layout=layout, shape=(64, 64))
    quantizer.calibrate_to(weight)
    gates = torch.arange(4) < open_gates
    bits = int(bits_of_gates(gates))
    error = quantizer.layout.parts(quantizer.rounded(weight, gates) - weight).abs()
    # A range is reached but for half a step, and numbers of 32 bits are not rounded.
    allowed = 0.0 if bits == 32 else 1.01 * step_at(quantizer.range_at(bits), bits).abs()
    assert bool((error <= allowed + 1e-6).all())
    assert torch.equal(quantizer.range_at(32), quantizer.range_ * headroom(scale_bits))


@pytest.mark.parametrize("scale_bits", NARROW)
def test_at_8_bits_nothing_is_clipped_by_more_than_a_step(scale_bits: int) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(6))
    quantizer = _fitted(weight, 8, scale_bits)
    gates = torch.tensor([True, True, False, False])
    error = quantizer.layout.parts(quantizer.rounded(weight, gates) - weight).abs()
    assert bool((error <= step_at(quantizer.range_at(8), 8).abs()).all())
