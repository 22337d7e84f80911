"""Rounding at one width: ties, widths held in tensors, 32 bits, broadcasting ranges, straight-through gradients."""

import pytest
import torch

from rankbits.quant.codes import codes, round_to_grid, step_at


def test_ties_go_to_the_even_code():
    step = torch.tensor(0.5)
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, -1.25])
    assert codes(x, step, 4).tolist() == [0.0, 2.0, 2.0, -0.0, -2.0, -2.0]


def test_codes_are_clamped_to_the_width():
    x, step = torch.tensor([-1e9, 1e9]), torch.tensor(1.0)
    assert codes(x, step, 2).tolist() == [-1.0, 1.0]
    assert codes(x, step, 8).tolist() == [-127.0, 127.0]
    assert codes(x, step, 8, signed=False).tolist() == [0.0, 255.0]


@pytest.mark.parametrize("signed", [True, False])
def test_width_may_be_an_integer_or_a_tensor(signed):
    x, beta = torch.linspace(-2.0, 2.0, 101), torch.tensor(1.1)
    for bits in (2, 4, 8, 16, 32):
        tensor = torch.tensor(bits)
        assert torch.equal(round_to_grid(x, beta, tensor, signed=signed), round_to_grid(x, beta, bits, signed=signed))
        assert torch.equal(step_at(beta, tensor, signed=signed), step_at(beta, bits, signed=signed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_value_is_step_times_code_bit_for_bit(bits, dtype):
    """What is delivered is the code and the step; evaluating must give the same numbers."""
    generator = torch.Generator().manual_seed(0)
    x, beta = torch.randn(1000, generator=generator).to(dtype), torch.tensor(1.7)
    step = step_at(beta, bits)
    assert torch.equal(round_to_grid(x, beta, bits), (step * codes(x, step, bits)).to(dtype))


@pytest.mark.parametrize("signed", [True, False])
def test_32_bits_clip_without_rounding(signed):
    x, beta = torch.tensor([-3.0, -0.1234567, 0.7654321, 3.0]), torch.tensor(1.5)
    expected = torch.clamp(x, -1.5 if signed else 0.0, 1.5)
    assert torch.equal(round_to_grid(x, beta, 32, signed=signed), expected)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_gradients_are_those_of_straight_through_rounding(bits, signed):
    x = torch.tensor([-2.0, -1.5, -0.4, 0.0, 0.7, 1.5, 2.0], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    g = torch.tensor([1.0, -2.0, 3.0, 0.5, 4.0, -1.0, 6.0], dtype=torch.float64)
    y = round_to_grid(x, beta, bits, signed=signed)
    grad_x, grad_beta = torch.autograd.grad((y * g).sum(), (x, beta))
    inside = torch.tensor([False, signed, signed, True, True, True, False])
    assert torch.equal(grad_x, torch.where(inside, g, 0.0))
    expected = (g * (y.detach() - torch.where(inside, x.detach(), 0.0))).sum() / 1.5
    torch.testing.assert_close(grad_beta, expected, rtol=1e-14, atol=1e-15)


def test_at_32_bits_clipped_elements_move_the_range_by_their_sign():
    x = torch.tensor([-9.0, 0.3, 9.0])
    beta = torch.tensor(2.0, requires_grad=True)
    for index, expected in enumerate([-1.0, 0.0, 1.0]):
        (grad,) = torch.autograd.grad(round_to_grid(x, beta, 32)[index], beta)
        assert grad.item() == expected


@pytest.mark.parametrize("shape", [(), (6, 1), (1, 4), (6, 4)])
def test_ranges_broadcast_and_receive_sums(shape):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    beta = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5).requires_grad_()
    full = beta.detach().expand(6, 4).clone().requires_grad_()
    (ours,) = torch.autograd.grad(round_to_grid(x, beta, 4).sum(), beta)
    (each,) = torch.autograd.grad(round_to_grid(x, full, 4).sum(), full)
    torch.testing.assert_close(ours, each.sum_to_size(shape), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_value_and_gradient_keep_the_type_of_the_input(dtype):
    x = torch.tensor([0.3, -5.0], dtype=dtype, requires_grad=True)
    beta = torch.tensor(1.0, requires_grad=True)
    y = round_to_grid(x, beta, 8)
    grad_x, grad_beta = torch.autograd.grad(y.sum(), (x, beta))
    assert (y.dtype, grad_x.dtype, grad_beta.dtype) == (dtype, dtype, torch.float32)


def test_steps_divide_each_other():
    beta = torch.tensor([0.2, 7.0], dtype=torch.float64)
    for signed in (True, False):
        steps = [step_at(beta, bits, signed=signed) for bits in (2, 4, 8, 16)]
        for coarse, fine, divisor in zip(steps, steps[1:], (5, 17, 257), strict=False):
            torch.testing.assert_close(coarse / fine, torch.full((2,), float(divisor), dtype=torch.float64))
