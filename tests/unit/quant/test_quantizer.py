"""The quantizer as a module: its learned range, saved state, hard mode, and what hardening leaves of it."""

import copy

import pytest
import torch

from rankbits.quant.codes import round_to_grid
from rankbits.quant.fixed_quantizer import FixedQuantizer
from rankbits.quant.grid import BIT_WIDTHS, Signedness
from rankbits.quant.quantizer import Quantizer

SOFT = torch.tensor([0.9, 0.5, 0.7, 0.3])


def _calibrated(size: float = 1.0, **options) -> Quantizer:
    quantizer = Quantizer(calibration_passes=0, **options)
    quantizer.calibrate_to(torch.tensor([size, -size]))
    return quantizer


def test_gradient_of_the_logarithm_of_the_range_has_no_division():
    quantizer = _calibrated(1.2)
    x = torch.linspace(-2.0, 2.0, 31)
    y = quantizer(x, SOFT, hard=False)
    (grad,) = torch.autograd.grad(y.sum(), quantizer.log_range)
    assert quantizer.range_.shape == ()
    inside = x.abs() <= quantizer.range_
    torch.testing.assert_close(grad.squeeze(), (y - torch.where(inside, x, 0.0)).sum().detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [1e-3, 5e-2])
@pytest.mark.parametrize("hard", [False, True])
def test_the_range_stays_positive_after_a_thousand_adversarial_steps(hard, rate):
    """The loss always wants a smaller range, and Adam makes every step the full rate."""
    quantizer = _calibrated(0.02)
    gates = torch.tensor([True, True, False, False]) if hard else SOFT
    optimizer = torch.optim.Adam([quantizer.log_range], lr=rate)
    x = torch.linspace(-1.0, 1.0, 16)
    for _ in range(1000):
        optimizer.zero_grad()
        quantizer(x, gates, hard=hard).abs().sum().backward()
        optimizer.step()
    assert quantizer.log_range.isfinite()
    assert 0.0 < quantizer.range_.item() < 0.02


def test_a_clipped_weight_recovers_through_the_range():
    quantizer = _calibrated(0.5)
    weight = torch.tensor([2.0])
    optimizer = torch.optim.Adam([quantizer.log_range], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer(weight, torch.ones(4), hard=False) - weight).square().sum().backward()
        optimizer.step()
    assert quantizer(weight, torch.ones(4), hard=False).item() == pytest.approx(2.0, rel=0.02)


def test_gradient_reaches_input_range_and_gates():
    quantizer, gates = _calibrated(), SOFT.clone().requires_grad_()
    x = torch.tensor([0.3, -0.8, 5.0], requires_grad=True)
    quantizer(x, gates, hard=False).square().sum().backward()
    assert (x.grad != 0).tolist() == [True, True, False]
    assert quantizer.log_range.grad != 0
    assert (gates.grad != 0).any()


@pytest.mark.parametrize("width", BIT_WIDTHS)
def test_hard_mode_rounds_at_the_width_of_the_gates(width):
    quantizer = _calibrated(1.7)
    x = torch.randn(200, generator=torch.Generator().manual_seed(0))
    gates = torch.arange(4) < BIT_WIDTHS.index(width)
    assert torch.equal(quantizer(x, gates, hard=True), round_to_grid(x, quantizer.range_, width))


def test_weights_and_range_keep_learning_in_hard_mode():
    quantizer, x = _calibrated(), torch.tensor([0.3, 3.0], requires_grad=True)
    quantizer(x, torch.tensor([True, False, False, False]), hard=True).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0]
    assert quantizer.log_range.grad != 0


@pytest.mark.parametrize("assign", [False, True])
def test_saved_state_restores_the_same_function(assign):
    quantizer = Quantizer(calibration_passes=3, signedness=Signedness.AUTO)
    for batch in ([1.0, 0.4], [2.5], [0.1]):
        quantizer(torch.tensor(batch), SOFT, hard=False)
    quantizer(torch.tensor([1.0]), SOFT, hard=False)
    with torch.no_grad():
        quantizer.log_range.add_(0.1)
    other = Quantizer(calibration_passes=3, signedness=Signedness.AUTO)
    # The copies on the host of what the device holds must not outlive a load.
    assert not other.is_calibrated
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()), assign=assign)
    assert other.is_calibrated
    assert not other.is_signed
    x = torch.linspace(-3.0, 3.0, 21)
    assert torch.equal(other(x, SOFT, hard=False), quantizer(x, SOFT, hard=False))
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert set(quantizer.state_dict()) == {"log_range", "maximum", "passes", "calibrated", "seen_negative", "fitted"}


def test_state_saved_in_the_middle_of_calibration_resumes_there():
    quantizer = Quantizer(calibration_passes=3, signedness=Signedness.AUTO)
    quantizer(torch.tensor([-5.0]), SOFT, hard=False)
    other = Quantizer(calibration_passes=3, signedness=Signedness.AUTO)
    other.load_state_dict(quantizer.state_dict())
    for _ in range(2):
        x = torch.tensor([1.0])
        assert torch.equal(other(x, SOFT, hard=False), x)
    assert other.finish_calibration()
    assert other.is_signed
    assert other.range_.item() == pytest.approx(5.0, rel=1e-6)


def test_loading_an_uncalibrated_state_takes_the_range_away():
    quantizer = _calibrated()
    quantizer.load_state_dict(Quantizer(calibration_passes=0).state_dict())
    assert not quantizer.is_calibrated


def test_a_copy_calibrates_on_its_own():
    quantizer = Quantizer(calibration_passes=0)
    other = copy.deepcopy(quantizer)
    other.calibrate_to(torch.ones(1))
    assert (quantizer.is_calibrated, other.is_calibrated) == (False, True)


def test_finishing_twice_keeps_a_trained_range():
    quantizer = _calibrated()
    with torch.no_grad():
        quantizer.log_range.fill_(-1.0)
    assert quantizer.finish_calibration()
    assert quantizer.log_range == -1.0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_fixed_quantizer(bits, signed):
    quantizer = FixedQuantizer(bits, signed=signed)
    quantizer.fixed_range.fill_(1.3)
    x = torch.linspace(-2.0, 2.0, 41, dtype=torch.bfloat16)
    y = quantizer.to(torch.bfloat16)(x)
    assert torch.equal(y, round_to_grid(x, torch.tensor(1.3), bits, signed=signed))
    assert list(quantizer.state_dict()) == ["fixed_range"]
    assert not list(quantizer.parameters())


def test_what_print_shows():
    assert repr(Quantizer(calibration_passes=7)) == "Quantizer(calibration_passes=7, signed, one range per tensor)"
    assert repr(FixedQuantizer(4, signed=False)) == "FixedQuantizer(bits=4, unsigned)"


def test_calibration_can_end_between_two_passes_of_one_forward():
    """A layer that a model runs several times, as ALBERT does, calibrates in one of them and rounds in the next."""
    quantizer = Quantizer(calibration_passes=1)
    gates = SOFT.clone().requires_grad_()
    x = torch.linspace(-1.0, 1.0, 9, requires_grad=True)
    quantizer(quantizer(x, gates, hard=False), gates, hard=False).sum().backward()
    assert quantizer.is_calibrated
    torch.testing.assert_close(x.grad, torch.ones(9))
    assert gates.grad.abs().sum() > 0
