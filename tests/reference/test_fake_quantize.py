"""The grids agree with PyTorch's own fake quantization wherever both can express the same grid."""

import pytest
import torch

from rankbits.quant.codes import codes, round_to_grid, step_at


def _values(beta: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(4096, generator=generator) * beta * 0.7


def _limits(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("beta", [0.037, 1.0, 412.0])
def test_values_equal_fake_quantize_up_to_ties(bits, signed, beta):
    x, range_ = _values(beta), torch.tensor(beta)
    step = step_at(range_, bits, signed=signed)
    foreign = torch.fake_quantize_per_tensor_affine(x, step.item(), 0, *_limits(bits, signed))
    ours = round_to_grid(x, range_, bits, signed=signed)
    # PyTorch multiplies with 1 / step: near a tie that may round the other way, in a few elements by one level.
    quotient = x / step
    tie = (quotient - quotient.floor() - 0.5).abs() < 2.0**bits * 1e-6
    torch.testing.assert_close(ours[~tie], foreign[~tie], rtol=1e-6, atol=0.0)
    assert (ours - foreign).abs().max() <= step * 1.001
    assert tie.float().mean() < 0.01


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradient_of_the_input_equals_fake_quantize_away_from_the_edge(bits):
    """PyTorch's mask is the range of codes plus half a step, which for a signed grid is our closed range."""
    x = _values(1.0).requires_grad_()
    step = step_at(torch.tensor(1.0), bits)
    edge = ((x.abs() - 1.0).abs() < 1e-5).detach()
    foreign = torch.fake_quantize_per_tensor_affine(x, step.item(), 0, *_limits(bits, True))
    (expected,) = torch.autograd.grad(foreign.sum(), x)
    (ours,) = torch.autograd.grad(round_to_grid(x, torch.tensor(1.0), bits).sum(), x)
    assert torch.equal(ours[~edge], expected[~edge])
    assert 0 < int((ours == 0).sum()) < x.numel()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_equal_quantize_per_channel(bits):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 64, generator=generator)
    beta = x.abs().amax(dim=1, keepdim=True) * 0.8
    step = step_at(beta, bits)
    low, high = _limits(bits, True)
    foreign = torch.fake_quantize_per_channel_affine(x, step.flatten(), torch.zeros(6, dtype=torch.int32), 0, low, high)
    quotient = x / step
    tie = (quotient - quotient.floor() - 0.5).abs() < 1e-4
    ours = codes(x, step, bits)
    assert torch.equal(ours[~tie], torch.round(foreign / step)[~tie])
    assert ours.min() == low
    assert ours.max() == high
