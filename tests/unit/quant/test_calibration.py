"""How a range is found: the passes that only record, what they leave out, and when they end."""

import math
import warnings

import pytest
import torch

from rankbits.errors import RankbitsWarning
from rankbits.quant import kernels
from rankbits.quant.grid import BIT_WIDTHS, Granularity, RangeLayout, Signedness
from rankbits.quant.quantizer import Quantizer
from rankbits.quant.weight_fit import RANGE_FLOOR

SOFT = torch.tensor([0.9, 0.5, 0.7, 0.3])


def _calibrated(x: torch.Tensor, **options) -> Quantizer:
    quantizer = Quantizer(calibration_passes=0, **options)
    quantizer.calibrate_to(x)
    return quantizer


@pytest.mark.parametrize("passes", [1, 3, 50])
def test_exactly_so_many_training_passes_are_the_identity(passes):
    quantizer = Quantizer(calibration_passes=passes)
    x = torch.tensor([0.3, -1.0])
    for done in range(passes):
        assert int(quantizer.passes) == done
        assert torch.equal(quantizer(x, SOFT, hard=False), x)
        assert not quantizer.is_calibrated
    assert not torch.equal(quantizer(x, SOFT, hard=False), x)
    assert quantizer.is_calibrated
    assert int(quantizer.passes) == passes


def test_identity_passes_keep_type_and_gradient_and_give_range_and_gates_zero_instead_of_none():
    """Data-parallel training expects a gradient of every parameter in every pass."""
    quantizer, gates = Quantizer(calibration_passes=1), SOFT.clone().requires_grad_()
    x = torch.tensor([0.3, -1.0], dtype=torch.bfloat16, requires_grad=True)
    y = quantizer(x, gates, hard=False)
    assert y.dtype == torch.bfloat16
    y.backward(torch.tensor([2.0, 3.0], dtype=torch.bfloat16))
    assert x.grad.tolist() == [2.0, 3.0]
    assert torch.equal(quantizer.log_range.grad, torch.zeros_like(quantizer.log_range))
    assert torch.equal(gates.grad, torch.zeros(4))


def test_hard_identity_passes_take_boolean_gates():
    quantizer = Quantizer(calibration_passes=1)
    x = torch.tensor([0.3], requires_grad=True)
    quantizer(x, torch.zeros(4, dtype=torch.bool), hard=True).backward(torch.tensor([2.0]))
    assert x.grad.tolist() == [2.0]


def test_hard_passes_calibrate_too():
    quantizer = Quantizer(calibration_passes=1)
    gates = torch.zeros(4, dtype=torch.bool)
    x = torch.tensor([0.9, -1.5])
    assert torch.equal(quantizer(x, gates, hard=True), x)
    assert quantizer(x, gates, hard=True).tolist() == [1.0, -1.0]


def test_the_range_is_the_running_maximum_not_the_first_or_last_batch():
    quantizer = Quantizer(calibration_passes=3)
    for batch in ([0.5, -0.2], [0.1, -4.0], [1.0, 2.0]):
        quantizer(torch.tensor(batch), SOFT, hard=False)
    quantizer(torch.tensor([100.0]), SOFT, hard=False)
    assert quantizer.range_.item() == pytest.approx(4.0, rel=1e-6)


def test_the_calibrated_quantizer_is_the_kernel_with_its_range():
    x = torch.randn(40, generator=torch.Generator().manual_seed(0))
    quantizer = _calibrated(torch.tensor([1.3]))
    assert torch.equal(quantizer(x, SOFT, hard=False), kernels.quantize(x, quantizer.range_, SOFT))


def test_zeros_stay_in_calibration_and_leave_it_when_values_appear():
    quantizer = Quantizer(calibration_passes=2)
    zeros = torch.zeros(3, requires_grad=True)
    for _ in range(5):
        y = quantizer(zeros, SOFT, hard=False)
        assert torch.equal(y, zeros)
    assert not quantizer.is_calibrated
    assert not quantizer.finish_calibration()
    x = torch.tensor([0.25, -0.5])
    assert torch.equal(quantizer(x, SOFT, hard=False), x)
    y = quantizer(x, SOFT, hard=False)
    assert quantizer.is_calibrated
    assert quantizer.range_.item() == pytest.approx(0.5, rel=1e-6)
    assert y.isfinite().all()


@pytest.mark.parametrize(("size", "calibrated"), [(0.5, False), (1.0, False), (2.0, True)])
def test_floor_of_what_counts_as_a_range(size, calibrated):
    quantizer = Quantizer(calibration_passes=0)
    quantizer.record(torch.tensor([size * RANGE_FLOOR]))
    assert quantizer.finish_calibration() is calibrated
    assert quantizer.is_calibrated is calibrated


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_values_warn_and_are_left_out(bad, dtype):
    quantizer = Quantizer(calibration_passes=1)
    x = torch.tensor([1.0, bad, -3.0], dtype=dtype)
    with pytest.warns(RankbitsWarning, match="NaN or infinite values while calibrating"):
        quantizer(x, SOFT, hard=False)
    assert quantizer.finish_calibration()
    assert quantizer.range_.item() == pytest.approx(3.0, rel=1e-6)


def test_only_non_finite_values_leave_it_calibrating():
    quantizer = Quantizer(calibration_passes=0)
    with pytest.warns(RankbitsWarning, match="NaN or infinite"):
        quantizer.calibrate_to(torch.tensor([math.nan, math.inf]))
    assert not quantizer.is_calibrated
    assert quantizer.maximum == 0.0


def test_empty_batches_count_as_passes_and_record_nothing():
    quantizer = Quantizer(calibration_passes=2)
    quantizer(torch.empty(0, 4), SOFT, hard=False)
    quantizer(torch.tensor([2.0]), SOFT, hard=False)
    assert int(quantizer.passes) == 2
    assert quantizer.finish_calibration()
    assert quantizer.range_.item() == pytest.approx(2.0, rel=1e-6)


def test_evaluated_before_calibration_it_is_the_identity_and_says_so_once():
    quantizer = Quantizer(calibration_passes=0).eval()
    x = torch.tensor([0.3, -1.0])
    with pytest.warns(RankbitsWarning, match="evaluated before its range was calibrated: it is the identity"):
        assert torch.equal(quantizer(x, SOFT, hard=False), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(quantizer(x, torch.zeros(4, dtype=torch.bool), hard=True), x)
    assert int(quantizer.passes) == 0
    assert quantizer.maximum == 0.0


def test_evaluation_between_training_passes_records_nothing():
    quantizer = Quantizer(calibration_passes=2)
    quantizer(torch.tensor([1.0]), SOFT, hard=False)
    quantizer.eval()
    with pytest.warns(RankbitsWarning):
        quantizer(torch.tensor([50.0]), SOFT, hard=False)
    quantizer.train()
    quantizer(torch.tensor([2.0]), SOFT, hard=False)
    assert quantizer.finish_calibration()
    assert quantizer.range_.item() == pytest.approx(2.0, rel=1e-6)


def test_rounded_records_nothing_and_is_the_identity_without_a_range():
    quantizer = Quantizer(calibration_passes=1)
    x, closed = torch.tensor([0.9, -1.5]), torch.zeros(4, dtype=torch.bool)
    assert quantizer.rounded(x, closed) is x
    assert int(quantizer.passes) == 0
    quantizer.calibrate_to(x)
    assert quantizer.rounded(x, closed).tolist() == [1.0, -1.0]


def test_automatic_signedness():
    positive = _calibrated(torch.tensor([0.0, 2.0]), signedness=Signedness.AUTO)
    both = _calibrated(torch.tensor([-0.1, 2.0]), signedness=Signedness.AUTO)
    assert (positive.is_signed, both.is_signed) == (False, True)
    closed = torch.zeros(4, dtype=torch.bool)
    x = torch.tensor([-1.0, 0.7, 9.0])
    torch.testing.assert_close(positive.rounded(x, closed), torch.tensor([0.0, 2 / 3, 2.0]))
    torch.testing.assert_close(both.rounded(x, closed), torch.tensor([-4 / 3, 4 / 3, 4 / 3])[[0, 1, 2]])
    assert torch.equal(positive(x, SOFT, hard=False), kernels.quantize(x, positive.range_, SOFT, signed=False))


@pytest.mark.parametrize(("signedness", "signed"), [(Signedness.SIGNED, True), (Signedness.UNSIGNED, False)])
def test_fixed_signedness_does_not_follow_the_values(signedness, signed):
    for values in ([1.0, 2.0], [-1.0, 2.0]):
        assert _calibrated(torch.tensor(values), signedness=signedness).is_signed is signed


def test_a_negative_value_of_an_early_pass_is_remembered():
    quantizer = Quantizer(calibration_passes=3, signedness=Signedness.AUTO)
    for batch in ([1.0], [-0.5], [2.0]):
        quantizer(torch.tensor(batch), SOFT, hard=False)
    assert quantizer.finish_calibration()
    assert quantizer.is_signed


def test_automatic_signedness_leaves_infinite_values_out():
    quantizer = Quantizer(calibration_passes=0, signedness=Signedness.AUTO)
    with pytest.warns(RankbitsWarning, match="NaN or infinite"):
        quantizer.calibrate_to(torch.tensor([1.0, -math.inf]))
    assert not quantizer.is_signed


def test_headroom_makes_a_constant_exact_at_every_width():
    quantizer = _calibrated(torch.ones(5), headroom=1.5)
    assert quantizer.range_.item() == 1.5
    ones = torch.ones(5)
    for width in BIT_WIDTHS:
        gates = torch.arange(4) < BIT_WIDTHS.index(width)
        assert torch.equal(quantizer.rounded(ones, gates), ones)
        assert torch.equal(quantizer(ones, gates.float(), hard=False), ones)


def test_cover_widens_and_never_narrows():
    quantizer = Quantizer(calibration_passes=0)
    quantizer.cover(torch.tensor([9.0]))
    assert quantizer.log_range == 0.0
    quantizer.calibrate_to(torch.tensor([1.0]))
    quantizer.cover(torch.tensor([0.5, -3.0]))
    assert quantizer.range_.item() == pytest.approx(3.0, rel=1e-6)
    quantizer.cover(torch.tensor([2.0]))
    quantizer.cover(torch.zeros(2))
    assert quantizer.range_.item() == pytest.approx(3.0, rel=1e-6)
    assert quantizer.log_range.requires_grad


def test_calibrating_to_a_tensor_without_data_is_left_for_later():
    quantizer = Quantizer(calibration_passes=0)
    quantizer.calibrate_to(torch.empty(3, device="meta"))
    assert int(quantizer.passes) == 0
    assert not quantizer.is_calibrated


def test_a_quantizer_without_data_is_not_calibrated():
    """PEFT can build adapters on the meta device beside a real model; their state is loaded afterwards."""
    with torch.device("meta"):
        quantizer = Quantizer(calibration_passes=0)
    quantizer.calibrate_to(torch.ones(3, device="cpu"))
    assert not quantizer.finish_calibration()


def test_a_range_that_covers_is_widened_in_the_pass_in_which_calibration_ends() -> None:
    quantizer = Quantizer(calibration_passes=1).train()
    gates = torch.ones(4)
    quantizer(torch.tensor([0.5, -1.0]), gates, hard=False, cover=True)
    x = torch.tensor([3.0, -0.25], requires_grad=True)
    # Under activation checkpointing the second of these is the same pass, recomputed.
    first, again = (quantizer(x, gates, hard=False, cover=True) for _ in range(2))
    torch.testing.assert_close(first, x, rtol=1e-6, atol=0.0)
    assert torch.equal(first, again)
    torch.testing.assert_close(quantizer.range_, torch.tensor(3.0), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 1e4])
def test_no_largest_value_lies_outside_its_range(size: float) -> None:
    """In groups the largest value is one in a few: without its gradient the update would learn another thing."""
    generator = torch.Generator().manual_seed(4)
    x = size * torch.randn(64, 512, generator=generator)
    layout = RangeLayout(Granularity.GROUP, 8)
    for covered in (False, True):
        quantizer = Quantizer(calibration_passes=1, layout=layout, shape=(64, 512))
        quantizer.calibrate_to(0.5 * x if covered else x)
        if covered:
            quantizer.cover(x)
        assert bool((quantizer.range_ >= layout.magnitudes(x)).all())
        torch.testing.assert_close(quantizer.range_.detach(), layout.magnitudes(x), rtol=1e-5, atol=0.0)
        leaf = x.clone().requires_grad_()
        quantizer(leaf, torch.ones(4), hard=False).sum().backward()
        assert leaf.grad is not None
        assert bool((leaf.grad == 1.0).all())
