"""Zeros, constants, and the largest and smallest numbers: value and gradient stay finite, in every type."""

import pytest
import torch

from rankbits.quant import kernels, reference
from rankbits.quant.codes import round_to_grid

SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
SOFT = [0.9, 0.5, 0.7, 0.3]


def _flat(x, beta, gates, *, signed):
    return round_to_grid(x, beta, 8, signed=signed) + 0.0 * gates.sum().to(x.dtype)


QUANTIZERS = pytest.mark.parametrize(
    "quantize", [reference.quantize, kernels.quantize, _flat], ids=["reference", "kernels", "codes"]
)


def _finite(quantize, x: torch.Tensor, beta: float, signed: bool) -> torch.Tensor:
    x = x.clone().requires_grad_()
    range_, gates = torch.tensor(beta, requires_grad=True), torch.tensor(SOFT, requires_grad=True)
    y = quantize(x, range_, gates, signed=signed)
    for tensor in (y, *torch.autograd.grad(y.sum(), (x, range_, gates))):
        assert tensor.isfinite().all()
    return y.detach()


@TYPES
@SIGNS
@QUANTIZERS
@pytest.mark.parametrize("beta", [1e-38, 1e-20, 1.0, 1e20, 1e38])
def test_zeros_stay_zeros(quantize, signed, dtype, beta):
    assert (_finite(quantize, torch.zeros(4, 3, dtype=dtype), beta, signed) == 0).all()


@TYPES
@SIGNS
@QUANTIZERS
@pytest.mark.parametrize("beta", [1e-38, 1e-8, 1.0, 1e38])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-8, 1.0, 6e4, 1e38])
def test_extreme_values_and_ranges_stay_finite(quantize, signed, dtype, beta, magnitude):
    x = torch.tensor([magnitude, -magnitude], dtype=torch.float64).to(dtype)
    if not x.isfinite().all():
        x = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    y = _finite(quantize, x, beta, signed)
    # Below the smallest normal number a step is held there, and the 127 or 255 levels of so small a range exceed it.
    limit = max(beta, 255 * torch.finfo(torch.float32).tiny) * (1.0 + 2.0**-7)
    assert (y.double().abs() <= limit).all()


@SIGNS
@pytest.mark.parametrize(
    "quantize",
    [
        reference.quantize,
        kernels.quantize,
        _flat,
    ],
    ids=["reference", "kernels", "codes"],
)
def test_many_clipped_values_of_a_huge_range_have_a_finite_gradient(quantize, signed):
    """Each moves the range by the level it stands on, in units of the range."""
    range_, gates = torch.tensor(1e38, requires_grad=True), torch.tensor([1.0, 1.0, 0.0, 0.0])
    (grad,) = torch.autograd.grad(quantize(torch.full((64,), 3e38), range_, gates, signed=signed).sum(), range_)
    assert grad.item() == pytest.approx(64 * (254 / 255 if signed else 1.0), rel=1e-5)


@TYPES
@SIGNS
@QUANTIZERS
@pytest.mark.parametrize("constant", [1.0, -1.0, 0.25])
def test_constant_tensors(quantize, signed, dtype, constant):
    y = _finite(quantize, torch.full((5, 2), constant, dtype=dtype), abs(constant), signed)
    assert y.unique().numel() == 1


@QUANTIZERS
def test_largest_half_precision_numbers_survive_the_way_back(quantize):
    largest = torch.finfo(torch.float16).max
    y = _finite(quantize, torch.tensor([largest, -largest], dtype=torch.float16), largest, True)
    assert (y.abs() > largest * 0.6).all()
