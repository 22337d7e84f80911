"""Ranges of activations: which one is taken, by the definition of the squared error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankbits.quant.grid import Signedness
from rankbits.quant.quantizer import Quantizer
from rankbits.quant.range_fit import FACTORS, FITTED_WIDTHS, ROWS, RangeFit

PRESENT = FACTORS.index(1.0)


def _quantizer(x: Tensor, signedness: Signedness = Signedness.AUTO) -> Quantizer:
    quantizer = Quantizer(calibration_passes=1, signedness=signedness)
    quantizer.calibrate_to(x)
    return quantizer


def _range(quantizer: Quantizer) -> float:
    return float(quantizer.range_.detach())


def _with_outliers(rows: int = 64) -> Tensor:
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(2))
    x[0, 0] = 10.0
    return x


def _error(x: Tensor, range_: float, bits: int, *, signed: bool) -> float:
    """From the definition: a uniform grid of 2^b - 1 steps over the range, clipped to its codes."""
    step = (2 * range_ if signed else range_) / (2**bits - 1)
    low, high = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return float(((x.double() / step).round().clamp(low, high) * step - x.double()).square().sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_the_range_is_the_one_with_the_least_squared_error(bits: int, *, signed: bool) -> None:
    x = _with_outliers() if signed else _with_outliers().abs()
    quantizer = _quantizer(x)
    fit = RangeFit(quantizer)
    for part in x.split(16):
        fit.see(part)
    errors = [_error(x, 10.0 * factor, bits, signed=signed) for factor in FACTORS]
    torch.testing.assert_close(fit.errors[FITTED_WIDTHS.index(bits), :, 0], torch.tensor(errors), rtol=1e-4, atol=1e-3)
    assert float(fit.errors_left()[FITTED_WIDTHS.index(bits)]) == pytest.approx(min(errors) / errors[PRESENT], rel=1e-3)
    fit.settle(bits)
    best = min(range(len(FACTORS)), key=errors.__getitem__)
    assert _range(quantizer) == pytest.approx(10.0 * FACTORS[best], rel=1e-5)
    assert (best > PRESENT) == (bits < 8)  # of 255 codes enough are left for the many, of 15 not
    assert quantizer.is_signed == signed


def test_from_16_bits_on_a_range_stays() -> None:
    x = _with_outliers()
    quantizer = _quantizer(x)
    fit = RangeFit(quantizer)
    fit.see(x)
    fit.settle(16)
    fit.settle(32)
    assert _range(quantizer) == pytest.approx(10.0)


def test_units_do_not_matter() -> None:
    x = _with_outliers()
    fits = []
    for unit in (1.0, 1024.0):
        quantizer = _quantizer(unit * x)
        fit = RangeFit(quantizer)
        fit.see(unit * x)
        fit.settle(4)
        fits.append(_range(quantizer) / unit)
    assert fits[0] == pytest.approx(fits[1], rel=1e-5)


def test_rows_are_drawn_from_the_whole_pass_and_the_default_generator_is_left_alone() -> None:
    x = torch.zeros(2 * ROWS, 20 * ROWS, 4)
    x[:, ::7] = 1.0
    quantizer = _quantizer(x, Signedness.SIGNED)
    before = torch.get_rng_state()
    fit = RangeFit(quantizer)
    fit.see(x[0])
    first = fit.errors.clone()
    assert torch.equal(torch.get_rng_state(), before)
    # A row of ones costs 4 (1 - 2/3)^2 with the present range; one in seven are ones.
    share = float(fit.present[0]) / (4 / 9) / ROWS
    assert 0.07 < share < 0.22
    again = RangeFit(quantizer)
    again.see(x[0])
    assert torch.equal(again.errors, first)
    fit.see(x[0])
    assert not torch.equal(fit.errors, 2 * first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_change_nothing(value: float) -> None:
    quantizer = _quantizer(_with_outliers())
    fit = RangeFit(quantizer)
    fit.see(torch.full((4, 8), value))
    assert torch.equal(fit.errors_left(), torch.ones(3))
    fit.settle(4)
    assert _range(quantizer) == pytest.approx(10.0)


def test_half_precision_is_judged_in_single_precision() -> None:
    x = _with_outliers()
    quantizer = _quantizer(x.bfloat16())
    fit = RangeFit(quantizer)
    fit.see(x.bfloat16())
    expected = [_error(x.bfloat16(), 10.0 * factor, 4, signed=True) for factor in FACTORS]
    torch.testing.assert_close(fit.errors[1, :, 0], torch.tensor(expected), rtol=1e-4, atol=1e-3)


def test_a_range_can_widen_to_what_reaches_the_largest_value() -> None:
    """The largest code of two signed bits lies at two thirds of the range."""
    x = torch.tensor([[-1.0, 1.0, 0.0, 1.0]])
    quantizer = _quantizer(x)
    fit = RangeFit(quantizer)
    fit.see(x)
    errors = [_error(x, factor, 2, signed=True) for factor in FACTORS]
    fit.settle(2)
    assert _range(quantizer) == pytest.approx(FACTORS[min(range(len(FACTORS)), key=errors.__getitem__)])
    assert _range(quantizer) > 1.0


def test_of_nothing_but_zeros_a_range_stays() -> None:
    quantizer = _quantizer(_with_outliers())
    fit = RangeFit(quantizer)
    fit.see(torch.zeros(4, 8))
    fit.settle(2)
    assert _range(quantizer) == pytest.approx(10.0)
