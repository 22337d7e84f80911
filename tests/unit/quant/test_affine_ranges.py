"""Ranges of activations that begin at low ends of their own: which are chosen, and what they round to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankbits.quant.fixed_quantizer import FixedQuantizer
from rankbits.quant.grid import PER_TENSOR, Granularity, RangeLayout, Signedness
from rankbits.quant.quantizer import Quantizer
from rankbits.quant.range_fit import SHARES, RangeFit

FEATURES, SIZE = 12, 4
GROUPS = RangeLayout(Granularity.GROUP, SIZE)
GATES = {2: (0, 0, 0, 0), 4: (1, 0, 0, 0), 8: (1, 1, 0, 0)}
LAYOUTS = pytest.mark.parametrize("layout", [PER_TENSOR, GROUPS], ids=["tensor", "groups"])
WIDTHS = pytest.mark.parametrize("bits", GATES)


def _gelu(rows: int, seed: int = 0) -> Tensor:
    x = torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.gelu(x) * torch.tensor([1.0, 10.0, 0.1]).repeat_interleave(SIZE)


def _quantizer(x: Tensor, layout: RangeLayout) -> Quantizer:
    quantizer = Quantizer(calibration_passes=1, signedness=Signedness.AFFINE, layout=layout, shape=(FEATURES,))
    quantizer.calibrate_to(x)
    return quantizer


def _fit(quantizer: Quantizer, x: Tensor) -> RangeFit:
    fit = RangeFit(quantizer)
    for show in (fit.look, fit.see):
        for part in x.split(16):
            show(part)
    return fit


def _settled(x: Tensor, layout: RangeLayout, bits: int) -> Quantizer:
    quantizer = _quantizer(x, layout)
    _fit(quantizer, x).settle(bits)
    return quantizer


def _by_range(x: Tensor, layout: RangeLayout) -> list[Tensor]:
    return list(x.split(SIZE, dim=-1)) if layout is GROUPS else [x]


def _on_affine_grid(x: Tensor, low: float, range_: float, bits: int) -> Tensor:
    """From the definition: 2^b codes from the low end to the high one (Bayesian-LoRA, Eq. 3, with any range)."""
    step = range_ / (2**bits - 1)
    return low + step * ((x.double() - low) / step).round().clamp(0, 2**bits - 1)


@WIDTHS
@LAYOUTS
def test_each_range_is_the_share_of_what_its_values_span_with_the_least_error(layout: RangeLayout, bits: int) -> None:
    x = _gelu(64)
    quantizer = _settled(x, layout, bits)
    lows, ranges = quantizer.low_, quantizer.range_.detach()
    assert lows is not None
    for part, low, range_ in zip(_by_range(x, layout), lows.flatten(), ranges.flatten(), strict=True):
        span, mean = (float(part.min()), float(part.max())), float(part.double().mean())
        tried = [(mean + s * (span[0] - mean), s * (span[1] - span[0])) for s in SHARES]
        errors = [float((_on_affine_grid(part, *ends, bits) - part).square().sum()) for ends in tried]
        best = tried[min(range(len(tried)), key=errors.__getitem__)]
        assert (float(low), float(range_)) == pytest.approx(best, rel=1e-4, abs=1e-5)


@WIDTHS
@LAYOUTS
def test_values_lie_on_the_grid_above_the_low_end(layout: RangeLayout, bits: int) -> None:
    x = _gelu(64)
    quantizer = _settled(x, layout, bits)
    assert not quantizer.is_signed
    other = _gelu(16, seed=5)
    y = quantizer(other, torch.tensor(GATES[bits], dtype=torch.bool), hard=True).detach()
    assert quantizer.low_ is not None
    ends = zip(quantizer.low_.flatten().tolist(), quantizer.range_.flatten().tolist(), strict=True)
    parts = zip(_by_range(other, layout), ends, strict=True)
    expected = torch.cat([_on_affine_grid(part, *pair, bits) for part, pair in parts], dim=-1)
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-6)


@LAYOUTS
def test_at_four_bits_it_rounds_with_less_error_than_around_zero(layout: RangeLayout) -> None:
    x = _gelu(64)
    fit = _fit(_quantizer(x, layout), x)
    around = Quantizer(calibration_passes=1, signedness=Signedness.AUTO, layout=layout, shape=(FEATURES,))
    around.calibrate_to(x)
    other = _fit(around, x)
    torch.testing.assert_close(fit.present, other.present)
    assert bool((fit.errors_left() < 0.5 * other.errors_left())[1])


@LAYOUTS
def test_training_evaluation_and_the_hardened_grid_agree_bit_for_bit(layout: RangeLayout) -> None:
    x = _gelu(64)
    quantizer = _settled(x, layout, 4)
    gates = torch.tensor(GATES[4], dtype=torch.bool)
    trained = quantizer.train()(x, gates, hard=True).detach()
    with torch.no_grad():
        evaluated = quantizer.eval()(x, gates, hard=True)
    fixed = FixedQuantizer(4, signed=False, layout=layout, shape=(FEATURES,), affine=True)
    fixed.fixed_range, fixed.lows = quantizer.range_at(4).detach().clone(), quantizer.low_
    assert torch.equal(trained, evaluated)
    assert torch.equal(fixed(x), evaluated)
    soft = quantizer(x, torch.tensor(GATES[4], dtype=torch.float32), hard=False)
    torch.testing.assert_close(soft, evaluated, rtol=1e-5, atol=1e-6)


@LAYOUTS
def test_gradients_pass_inside_the_range_and_the_high_end_learns(layout: RangeLayout) -> None:
    x = _gelu(64)
    quantizer = _settled(x, layout, 2)
    leaf = (1.5 * x).requires_grad_()
    quantizer(leaf, torch.tensor(GATES[2], dtype=torch.bool), hard=True).sum().backward()
    low, parts = quantizer.low_, layout.parts(leaf.detach())
    assert low is not None
    inside = (parts >= low) & (parts <= low + quantizer.range_)
    assert leaf.grad is not None
    assert not bool(inside.all())
    assert torch.equal(leaf.grad, inside.reshape(leaf.shape).float())
    assert quantizer.log_range.grad is not None
    assert bool((quantizer.log_range.grad != 0).all())


def test_half_precision_stays_and_is_rounded_in_single_precision() -> None:
    x = _gelu(64).bfloat16()
    quantizer = _settled(x, GROUPS, 4)
    for hard in (True, False):
        gates = torch.tensor(GATES[4], dtype=torch.bool if hard else torch.float32)
        y = quantizer(x, gates, hard=hard)
        assert y.dtype == torch.bfloat16
        expected = quantizer(x.float(), gates, hard=hard).bfloat16()
        assert torch.equal(y, expected)


def test_above_eight_bits_a_range_stays_around_zero() -> None:
    x = _gelu(64)
    quantizer = _settled(x, GROUPS, 16)
    assert quantizer.is_signed
    assert quantizer.low_ is not None
    assert not bool(quantizer.low_.any())


def test_a_range_with_values_that_are_not_finite_keeps_its_ends_alone() -> None:
    x = _gelu(64)
    before = _quantizer(x, GROUPS).range_.detach().flatten()
    usual = _settled(x, GROUPS, 4)
    quantizer = _quantizer(x, GROUPS)
    spoilt = x.clone()
    spoilt[3, 1] = float("nan")
    fit = _fit(quantizer, spoilt)
    assert torch.equal(fit.errors_left(), torch.ones(3))
    fit.settle(4)
    assert quantizer.low_ is not None
    assert usual.low_ is not None
    assert float(quantizer.low_.flatten()[0]) == -float(before[0])
    assert float(quantizer.range_.detach().flatten()[0]) == pytest.approx(2 * float(before[0]))
    torch.testing.assert_close(quantizer.low_.flatten()[1:], usual.low_.flatten()[1:])


def test_of_one_value_alone_the_value_is_kept() -> None:
    x = torch.full((8, FEATURES), -0.25)
    quantizer = _settled(x, GROUPS, 4)
    assert torch.equal(quantizer(x, torch.tensor(GATES[4], dtype=torch.bool), hard=True).detach(), x)


def test_a_fit_that_is_forgotten_leaves_a_range_around_zero_that_covers_the_affine_one() -> None:
    x = _gelu(64)
    quantizer = _settled(x, GROUPS, 8)
    assert quantizer.low_ is not None
    ends = torch.maximum(-quantizer.low_, quantizer.low_ + quantizer.range_).detach()
    quantizer.forget_fit()
    assert quantizer.is_signed
    assert not bool(quantizer.low_.any())
    torch.testing.assert_close(quantizer.range_.detach(), ends)
    again = quantizer.range_.detach().clone()
    quantizer.forget_fit()
    assert torch.equal(quantizer.range_.detach(), again)


def test_what_no_pass_reached_keeps_its_range_and_empty_passes_say_nothing() -> None:
    x = _gelu(64)
    quantizer = _quantizer(x, GROUPS)
    before = quantizer.range_.detach().flatten()
    fit = RangeFit(quantizer)
    for show in (fit.look, fit.see):
        show(torch.empty(0, FEATURES))
    assert torch.equal(fit.errors_left(), torch.ones(3))
    fit.settle(4)
    assert quantizer.low_ is not None
    torch.testing.assert_close(quantizer.low_.flatten(), -before)
    torch.testing.assert_close(quantizer.range_.detach().flatten(), 2 * before)


def test_negative_values_are_not_forgotten_where_no_range_began_below_zero() -> None:
    x = _gelu(64) + 5.0
    x[0, 0] = -1.0
    quantizer = _quantizer(x, PER_TENSOR)
    quantizer.settle(torch.tensor([9.0]), torch.tensor([1.0]))
    assert not quantizer.is_signed
    quantizer.forget_fit()
    assert quantizer.is_signed
