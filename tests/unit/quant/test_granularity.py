"""Ranges finer than the tensor: their shapes, their calibration, their grids and the fit of their size."""

import pytest
import torch

from rankbits.quant import reference
from rankbits.quant.codes import round_to_grid
from rankbits.quant.fixed_quantizer import FixedQuantizer
from rankbits.quant.grid import Granularity, RangeLayout, bits_of_gates
from rankbits.quant.quantizer import Quantizer
from rankbits.quant.weight_fit import FIT_FACTORS

CHANNEL = RangeLayout(Granularity.CHANNEL)
GROUPS = RangeLayout(Granularity.GROUP, 4)
OPEN = torch.tensor([1.0, 0.7, 0.2, 0.0])


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("layout", "shape"), [(RangeLayout(), (1,)), (CHANNEL, (3, 1)), (GROUPS, (3, 2, 1))])
def test_shapes(weight, layout, shape) -> None:
    assert layout.range_shape(weight.shape) == shape
    assert layout.magnitudes(weight).shape == shape


def test_magnitudes_are_those_of_each_part(weight) -> None:
    assert torch.equal(CHANNEL.magnitudes(weight)[:, 0], weight.abs().amax(1))
    expected = torch.stack([weight[:, :4].abs().amax(1), weight[:, 4:].abs().amax(1)], dim=1)
    assert torch.equal(GROUPS.magnitudes(weight)[..., 0], expected)


def test_groups_that_do_not_divide_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 5 do not divide rows of 8 inputs"):
        RangeLayout(Granularity.GROUP, 5).range_shape((3, 8))


@pytest.mark.parametrize("layout", [CHANNEL, GROUPS])
def test_each_part_is_quantized_as_a_tensor_of_its_own(weight, layout) -> None:
    quantizer = Quantizer(calibration_passes=0, layout=layout, shape=(3, 8))
    quantizer.calibrate_to(weight)
    result = quantizer(weight, OPEN, hard=False)
    assert result.shape == weight.shape
    for part, got in zip(
        layout.parts(weight).reshape(-1, 8 if layout is CHANNEL else 4),
        layout.parts(result).reshape(-1, 8 if layout is CHANNEL else 4),
        strict=True,
    ):
        torch.testing.assert_close(got, reference.quantize(part, part.abs().amax(), OPEN))


def test_gradients_of_parts_stay_apart(weight) -> None:
    quantizer = Quantizer(calibration_passes=0, layout=GROUPS, shape=(3, 8))
    quantizer.calibrate_to(weight)
    with torch.no_grad():
        quantizer.log_range.sub_(0.5)
    upstream = torch.zeros(3, 8)
    upstream[1, :4] = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (quantizer(weight, OPEN, hard=False) * upstream).sum().backward()
    grad = quantizer.log_range.grad[..., 0]
    assert grad[1, 0] != 0
    assert grad.count_nonzero() == 1


def test_a_part_of_zeros_gets_a_range_and_stays_finite(weight) -> None:
    weight[0] = 0.0
    quantizer = Quantizer(calibration_passes=0, layout=CHANNEL, shape=(3, 8))
    quantizer.calibrate_to(weight)
    result = quantizer(weight, OPEN, hard=False)
    assert result.isfinite().all()
    assert (result[0] == 0).all()
    quantizer.cover(torch.full((3, 8), 5.0))
    torch.testing.assert_close(quantizer.range_, torch.full((3, 1), 5.0))


def test_a_fixed_quantizer_rounds_as_the_learned_one(weight) -> None:
    gates = torch.tensor([True, False, False, False])
    learned = Quantizer(calibration_passes=0, layout=GROUPS, shape=(3, 8))
    learned.calibrate_to(weight)
    fixed = FixedQuantizer(int(bits_of_gates(gates)), layout=GROUPS, shape=(3, 8))
    assert fixed.fixed_range.shape == learned.range_.shape
    fixed.fixed_range = learned.range_.detach()
    assert torch.equal(fixed(weight), learned.rounded(weight, gates))


@pytest.mark.parametrize("layout", [RangeLayout(), CHANNEL, GROUPS])
@pytest.mark.parametrize("bits", [2, 4])
def test_fit_at_few_bits_takes_the_best_range_of_each_part(weight, layout, bits) -> None:
    weight = weight.pow(3)
    quantizer = Quantizer(calibration_passes=0, layout=layout, shape=(3, 8))
    quantizer.calibrate_to(weight)
    calibrated = quantizer.range_.detach().clone()
    reached = calibrated / (1 - 1 / (2**bits - 1))
    quantizer.fit(weight, bits)
    parts = layout.parts(weight)

    def errors(range_: torch.Tensor) -> torch.Tensor:
        squares = (round_to_grid(parts, range_, bits) - parts).square()
        return squares.sum() if range_.dim() == 0 else squares.sum(-1, keepdim=True)

    best = torch.stack([errors(reached * factor) for factor in FIT_FACTORS]).amin(0)
    torch.testing.assert_close(errors(quantizer.range_.detach()), best, rtol=1e-5, atol=1e-7)
    assert (quantizer.range_ != calibrated).any()


def test_fit_happens_once_and_survives_a_load(weight) -> None:
    quantizer = Quantizer(calibration_passes=0, layout=CHANNEL, shape=(3, 8))
    quantizer.calibrate_to(weight)
    quantizer.fit(weight, 2)
    fitted = quantizer.log_range.detach().clone()
    other = Quantizer(calibration_passes=0, layout=CHANNEL, shape=(3, 8))
    other.load_state_dict(quantizer.state_dict())
    for again in (quantizer, other):
        again.fit(weight * 3, 2)
        assert torch.equal(again.log_range, fitted)


@pytest.mark.parametrize("layout", [RangeLayout(), CHANNEL, GROUPS])
@pytest.mark.parametrize("bits", [8, 16])
def test_fit_at_wider_grids_reaches_the_largest_magnitudes(weight, layout, bits) -> None:
    quantizer = Quantizer(calibration_passes=0, layout=layout, shape=(3, 8))
    quantizer.calibrate_to(weight)
    quantizer.fit(weight * 2, bits)
    reached = round_to_grid(layout.parts(weight * 2), quantizer.range_.detach(), bits).reshape(weight.shape)
    torch.testing.assert_close(layout.magnitudes(reached), layout.magnitudes(weight * 2), rtol=1e-5, atol=0)


def test_at_eight_bits_the_fit_keeps_the_logarithm_of_what_reaches_the_largest_magnitude() -> None:
    """To the last bit, which an exponential of it and back would not keep."""
    weight = torch.linspace(0.14, 0.37, 4096)[:, None].repeat(1, 4)
    quantizer = Quantizer(calibration_passes=0, layout=CHANNEL, shape=(4096, 4))
    quantizer.calibrate_to(weight)
    quantizer.fit(weight, 8)
    expected = (weight.amax(dim=1, keepdim=True) / (1.0 - 1.0 / 255.0)).log()
    assert torch.equal(quantizer.log_range.detach(), expected)
    assert not torch.equal(expected.exp().log(), expected)
