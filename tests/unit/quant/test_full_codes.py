"""Grids with all codes of their width: one code more than there are on both sides, below zero or above it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankbits.quant.codes import codes, round_to_grid, step_at
from rankbits.quant.fixed_quantizer import FixedQuantizer
from rankbits.quant.grid import Granularity, RangeLayout, bits_of_gates
from rankbits.quant.quantizer import Quantizer

LAYOUTS = [RangeLayout(), RangeLayout(Granularity.CHANNEL), RangeLayout(Granularity.GROUP, 8)]
COARSEST = torch.zeros(4, dtype=torch.bool)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(32, 24, generator=torch.Generator().manual_seed(4))


def _fitted(weight: Tensor, layout: RangeLayout, bits: int, *, full: bool) -> Quantizer:
    quantizer = Quantizer(calibration_passes=0, layout=layout, shape=tuple(weight.shape), full=full, compensated=True)
    quantizer.calibrate_to(weight)
    quantizer.fit(weight, bits)
    return quantizer


def test_the_additional_code_lies_below_zero_or_above_where_the_step_is_negative() -> None:
    x = torch.tensor([-9.0, -2.0, -1.0, 0.0, 1.0, 2.0, 9.0])
    assert codes(x, torch.tensor(1.0), 2, full=True).tolist() == [-2, -2, -1, 0, 1, 1, 1]
    assert codes(x, torch.tensor(-1.0), 2, full=True).tolist() == [1, 1, 1, 0, -1, -2, -2]
    assert codes(9 * x, torch.tensor(1.0), 8, full=True).tolist() == [-81, -18, -9, 0, 9, 18, 81]
    assert codes(99 * x, torch.tensor(1.0), 8, full=True)[[0, -1]].tolist() == [-128, 127]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_there_are_as_many_values_as_the_width_can_tell_apart(bits: int) -> None:
    for beta in (torch.tensor(1.5, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)):
        step = step_at(beta, bits)
        found = round_to_grid(torch.arange(-(2**bits), 2**bits + 1) * step, beta, bits, full=True)
        assert len(found.unique()) == 2**bits
        assert torch.equal(round_to_grid(found, beta, bits, full=True), found)


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_a_negative_range_mirrors_the_grid(bits: int) -> None:
    x, beta = torch.linspace(-4.0, 4.0, 1001), torch.tensor(1.1)
    assert torch.equal(round_to_grid(x, -beta, bits, full=True), -round_to_grid(-x, beta, bits, full=True))


def test_only_the_additional_code_is_new() -> None:
    x, beta = torch.linspace(-1.1, 4.0, 1001), torch.tensor(1.1)
    assert torch.equal(round_to_grid(x, beta, 4, full=True), round_to_grid(x, beta, 4))
    # 32 bits are not rounded, and clipped where they were, to half of 2^-31 of the range.
    wide = torch.linspace(-4.0, 4.0, 1001)
    assert torch.equal(round_to_grid(wide, beta, 32, full=True), round_to_grid(wide, beta, 32))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_follow_the_wider_side(bits: int, sign: float) -> None:
    beta = torch.tensor(sign * 1.5, dtype=torch.float64, requires_grad=True)
    end = 1.5 + float(step_at(torch.tensor(1.5, dtype=torch.float64), bits))
    x = sign * torch.tensor([-end - 0.01, -end + 0.01, -1.2, 0.3, 1.49, 1.51], dtype=torch.float64)
    x.requires_grad_()
    y = round_to_grid(x, beta, bits, full=True)
    g = torch.arange(1.0, 7.0, dtype=torch.float64)
    grad_x, grad_beta = torch.autograd.grad(y, (x, beta), g)
    inside = torch.tensor([False, True, True, True, True, False])
    assert torch.equal(grad_x, torch.where(inside, g, 0.0))
    # Codes stand still between ties, where the derivative of the result by the range is the result over the range; the
    # straight-through gradient takes away what the clipped value itself would give.
    expected = (g * (y - torch.where(inside, x, 0.0))).sum() / beta
    torch.testing.assert_close(grad_beta, expected.detach(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [2, 4])
def test_fitted_it_rounds_each_part_no_worse_and_the_whole_better(
    weight: Tensor, layout: RangeLayout, bits: int
) -> None:
    gates = torch.arange(4) < {2: 0, 4: 1}[bits]
    errors = []
    for full in (False, True):
        quantizer = _fitted(weight, layout, bits, full=full)
        squares = layout.parts((quantizer.rounded(weight, gates) - weight).square())
        whole = layout.granularity is Granularity.TENSOR
        errors.append(squares.sum() if whole else squares.sum(-1))
    narrow, full_ = errors
    assert (full_ <= narrow * (1.0 + 1e-5)).all()
    assert full_.sum() < 0.97 * narrow.sum()


def test_the_side_is_the_one_that_needs_it() -> None:
    weight = torch.tensor([[-2.0, -1.0, 0.0, 1.0], [-1.0, 0.0, 1.0, 2.0]])
    quantizer = _fitted(weight, RangeLayout(Granularity.CHANNEL), 2, full=True)
    assert quantizer.sides is not None
    assert quantizer.sides.flatten().tolist() == [1, -1]
    torch.testing.assert_close(quantizer.rounded(weight, COARSEST), weight, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("bits", [8, 16])
def test_where_there_are_codes_enough_all_ranges_are_positive(weight: Tensor, bits: int) -> None:
    quantizer = _fitted(weight, LAYOUTS[2], 2, full=True)
    assert (quantizer.range_ < 0).any()
    quantizer.fit(weight, bits, again=True)
    assert (quantizer.range_ > 0).all()


def test_sides_are_saved_forgotten_with_the_fit_and_kept_by_learning(weight: Tensor) -> None:
    quantizer = _fitted(weight, LAYOUTS[2], 2, full=True)
    expected = quantizer.rounded(weight, COARSEST)
    other = Quantizer(calibration_passes=0, layout=LAYOUTS[2], shape=(32, 24), full=True, compensated=True)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.rounded(weight, COARSEST), expected)
    signs = quantizer.range_.sign()
    optimizer = torch.optim.SGD([quantizer.log_range], lr=0.1)
    for _ in range(20):
        (quantizer(weight, COARSEST, hard=True) - weight).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (quantizer.rounded(weight, COARSEST) != expected).any()
    assert torch.equal(quantizer.range_.sign(), signs)
    quantizer.forget_fit()
    assert (quantizer.range_ > 0).all()


def test_a_fixed_quantizer_rounds_as_the_learned_one(weight: Tensor) -> None:
    learned = _fitted(weight, LAYOUTS[2], 2, full=True)
    fixed = FixedQuantizer(int(bits_of_gates(COARSEST)), layout=LAYOUTS[2], shape=(32, 24), full=True)
    fixed.fixed_range = learned.range_.detach()
    assert torch.equal(fixed(weight), learned.rounded(weight, COARSEST))


@pytest.mark.parametrize("bits", [2, 4])
def test_compensated_codes_use_the_additional_one_and_move_outputs_less(weight: Tensor, bits: int) -> None:
    generator = torch.Generator().manual_seed(8)
    inputs = torch.randn(400, 24, generator=generator) + 2.0 * torch.randn(400, 1, generator=generator)
    gates, moment = torch.arange(4) < {2: 0, 4: 1}[bits], inputs.T @ inputs
    errors = []
    for full in (False, True):
        quantizer = _fitted(weight, LAYOUTS[2], bits, full=full)
        nearest = quantizer.rounded(weight, gates)
        quantizer.compensate(weight, bits, moment)
        rounded = quantizer.rounded(weight, gates)
        errors.append([(((found - weight) @ moment) * (found - weight)).sum() for found in (rounded, nearest)])
    (narrow, _), (compensated, nearest) = errors
    assert compensated < 0.8 * nearest
    assert compensated < 0.95 * narrow
    step = step_at(quantizer.range_, bits)
    found = torch.round(rounded.reshape(32, 3, 8) / step)
    assert (found.min().item(), found.max().item()) == (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
