"""Ranges for groups of what a layer reads: one for all rows each, calibrated, trained, fitted and kept by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankbits.quant import reference
from rankbits.quant.fixed_quantizer import FixedQuantizer
from rankbits.quant.grid import Granularity, RangeLayout, Signedness
from rankbits.quant.quantizer import Quantizer
from rankbits.quant.range_fit import RangeFit

GROUPS, SIZE = 3, 4
FEATURES = GROUPS * SIZE
SCALES = torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(SIZE)
LAYOUT = RangeLayout(Granularity.GROUP, SIZE)
WIDTHS = {2: (0, 0, 0, 0), 4: (1, 0, 0, 0), 8: (1, 1, 0, 0), 32: (1, 1, 1, 1)}


def _rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, FEATURES, generator=torch.Generator().manual_seed(seed)) * SCALES


def _quantizer(x: Tensor, signedness: Signedness = Signedness.AUTO) -> Quantizer:
    quantizer = Quantizer(calibration_passes=1, signedness=signedness, layout=LAYOUT, shape=(FEATURES,))
    quantizer.calibrate_to(x)
    return quantizer


def _by_group(x: Tensor) -> list[Tensor]:
    return list(x.split(SIZE, dim=-1))


def test_each_group_is_calibrated_to_its_largest_magnitude_in_all_rows() -> None:
    x = _rows(2, 5)
    quantizer = _quantizer(x)
    assert quantizer.range_count == GROUPS
    expected = torch.stack([part.abs().max() for part in _by_group(x)])
    torch.testing.assert_close(quantizer.range_.detach().flatten(), expected)


def test_a_group_that_shows_nothing_finite_does_not_spoil_the_others() -> None:
    x = _rows(5)
    x[1, 0] = float("nan")
    with pytest.warns(UserWarning, match="NaN or infinite"):
        ranges = _quantizer(x).range_.detach().flatten()
    assert float(ranges[0]) == pytest.approx(float(x[:, :SIZE].nan_to_num().abs().max()), rel=1e-5)
    assert float(ranges[1]) == pytest.approx(float(x[:, SIZE : 2 * SIZE].abs().max()), rel=1e-5)


@pytest.mark.parametrize("rows", [(), (1,), (7,), (2, 5)])
def test_ranges_widen_to_the_rows_of_a_pass(rows: tuple[int, ...]) -> None:
    quantizer = _quantizer(_rows(2, 5))
    x = 3.0 * _rows(*rows, seed=1)
    before = quantizer.range_.detach().flatten()
    quantizer.cover(x)
    largest = torch.stack([part.abs().max() for part in _by_group(x)])
    torch.testing.assert_close(quantizer.range_.detach().flatten(), torch.maximum(before, largest))


def test_a_pass_without_rows_widens_nothing() -> None:
    quantizer = _quantizer(_rows(2, 5))
    before = quantizer.range_.detach().clone()
    quantizer.cover(torch.empty(0, FEATURES))
    assert torch.equal(quantizer.range_.detach(), before)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("gates", WIDTHS.values(), ids=[f"{bits} bits" for bits in WIDTHS])
@pytest.mark.parametrize("signed", [True, False])
def test_values_and_gradients_are_those_of_each_group_rounded_by_itself(
    gates: tuple[int, ...], *, hard: bool, signed: bool
) -> None:
    x = _rows(2, 5) if signed else _rows(2, 5).abs()
    quantizer = _quantizer(x)
    assert quantizer.is_signed == signed
    with torch.no_grad():
        quantizer.log_range -= 0.5  # so that some values are clipped
    leaf, weight = x.clone().requires_grad_(), _rows(2, 5, seed=3)
    chain = torch.tensor(gates, dtype=torch.bool if hard else torch.float32)
    y = quantizer(leaf, chain, hard=hard)
    (y * weight).sum().backward()

    parts, ranges = [], []
    own = x.clone().requires_grad_()
    for part, range_ in zip(_by_group(own), quantizer.range_.detach().flatten(), strict=True):
        ranges.append(range_.clone().requires_grad_())
        parts.append(reference.quantize(part, ranges[-1], torch.tensor(gates, dtype=torch.float32), signed=signed))
    expected = torch.cat(parts, dim=-1)
    (expected * weight).sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert leaf.grad is not None
    assert own.grad is not None
    torch.testing.assert_close(leaf.grad, own.grad)
    by_range = torch.stack([r.grad * r.detach() for r in ranges if r.grad is not None])  # d/d log r = r d/dr
    assert quantizer.log_range.grad is not None
    torch.testing.assert_close(quantizer.log_range.grad.flatten(), by_range, rtol=1e-4, atol=1e-4)


def test_one_width_in_training_in_evaluation_and_fixed_is_the_same_bit_for_bit() -> None:
    x = _rows(2, 5)
    quantizer = _quantizer(x)
    gates = torch.tensor(WIDTHS[4], dtype=torch.bool)
    trained = quantizer.train()(x, gates, hard=True)
    with torch.no_grad():
        evaluated = quantizer.eval()(x, gates, hard=True)
    fixed = FixedQuantizer(4, layout=LAYOUT, shape=(FEATURES,))
    fixed.fixed_range = quantizer.range_at(4).detach().clone()
    assert fixed.range_count == GROUPS
    assert torch.equal(trained, evaluated)
    assert torch.equal(fixed(x), evaluated)


def test_each_range_is_fitted_by_itself() -> None:
    x = _rows(64)
    x[0, ::SIZE] *= 20.0
    quantizer = _quantizer(x)
    fit = RangeFit(quantizer)
    for part in x.split(16):
        fit.see(part)
    alone = []
    for part in _by_group(x):
        one = Quantizer(calibration_passes=1)
        one.calibrate_to(part)
        alone.append(RangeFit(one))
        for rows in part.split(16):
            alone[-1].see(rows)
    together = torch.stack([one.errors[..., 0] for one in alone], dim=-1)
    torch.testing.assert_close(fit.errors, together, rtol=1e-4, atol=1e-6)
    before = quantizer.range_.detach().flatten()
    fit.settle(4)
    for one in alone:
        one.settle(4)
    expected = torch.stack([one.quantizer.range_.detach() for one in alone])
    torch.testing.assert_close(quantizer.range_.detach().flatten(), expected)
    assert bool((expected < before).all())


def test_the_error_left_is_that_of_all_groups_together() -> None:
    quantizer = _quantizer(_rows(8))
    fit = RangeFit(quantizer)
    fit.present[1] = torch.tensor([4.0, 10.0, 2.0])
    fit.errors[1] = 2.0
    fit.errors[1, 3, 1] = 1.0
    assert float(fit.errors_left()[1]) == pytest.approx((2.0 + 1.0 + 2.0) / 16.0)


def test_a_group_with_values_that_are_not_finite_keeps_its_range_alone() -> None:
    x = _rows(64)
    x[0, ::SIZE] *= 20.0
    quantizer = _quantizer(x)
    before = quantizer.range_.detach().flatten()
    x[3, 1] = float("inf")
    fit = RangeFit(quantizer)
    fit.see(x)
    fit.settle(4)
    after = quantizer.range_.detach().flatten()
    assert float(after[0]) == pytest.approx(float(before[0]))
    assert bool((after[1:] < before[1:]).all())


def test_groups_that_do_not_divide_the_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 4 do not divide rows of 10 inputs"):
        Quantizer(calibration_passes=1, layout=LAYOUT, shape=(10,))


def test_a_group_without_values_in_calibration_is_coarse_and_not_dead() -> None:
    x = _rows(5)
    x[:, :SIZE] = 0.0
    quantizer = _quantizer(x)
    assert float(quantizer.range_.detach().flatten()[0]) == pytest.approx(float(x.abs().max()), rel=1e-5)
