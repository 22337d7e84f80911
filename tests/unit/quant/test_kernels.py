"""The closed-form backward equals autograd through the reference, for every broadcasting of the range."""

import pytest
import torch

from rankbits.quant import kernels, reference

SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
GATES = {
    "soft": [0.83, 0.41, 0.66, 0.27],
    "one zero": [0.9, 0.0, 0.7, 0.4],
    "two zeros": [0.0, 0.6, 0.0, 0.3],
    "closed": [0.0] * 4,
    "open": [1.0] * 4,
}
SHAPES = {
    "scalar": ((5, 12), ()),
    "one-element": ((5, 12), (1,)),
    "per channel": ((5, 12), (5, 1)),
    "per group": ((5, 3, 4), (5, 3, 1)),
    "per input": ((5, 12), (1, 12)),
    "per input, fewer dimensions": ((5, 12), (12,)),
    "batched": ((2, 3, 4), (3, 1)),
    "outer and inner": ((2, 3, 4), (2, 1, 4)),
    "each its own": ((5, 12), (5, 12)),
    "scalar tensor": ((), ()),
}


def _inputs(x_shape, range_shape, gates, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(x_shape, generator=generator, dtype=torch.float64)
    beta = torch.rand(range_shape, generator=generator, dtype=torch.float64) + 0.4
    g = torch.randn(x_shape, generator=generator, dtype=torch.float64)
    return x, beta, torch.tensor(gates, dtype=torch.float64), g


def _value_and_gradients(quantize, x, beta, gates, g, signed):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, beta, gates)]
    y = quantize(*leaves, signed=signed)
    return (y.detach(), *torch.autograd.grad((y * g).sum(), leaves))


@SIGNS
@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
@pytest.mark.parametrize(("x_shape", "range_shape"), SHAPES.values(), ids=SHAPES)
def test_closed_form_equals_autograd_of_the_reference(x_shape, range_shape, gates, signed):
    inputs = _inputs(x_shape, range_shape, gates)
    for ours, theirs, leaf in zip(
        _value_and_gradients(kernels.quantize, *inputs, signed),
        _value_and_gradients(reference.quantize, *inputs, signed),
        (inputs[0], *inputs[:3]),
        strict=True,
    ):
        assert ours.shape == leaf.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=5e-14)


@SIGNS
def test_closed_form_equals_autograd_for_random_soft_gates(signed):
    generator = torch.Generator().manual_seed(9)
    for seed in range(40):
        gates = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        inputs = _inputs((7, 9), (7, 1), gates, seed)
        for ours, theirs in zip(
            _value_and_gradients(kernels.quantize, *inputs, signed),
            _value_and_gradients(reference.quantize, *inputs, signed),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=5e-14)


@SIGNS
def test_gradients_at_the_edges_of_the_range(signed):
    """The closed range is inside: an element exactly at its edge still gets its gradient."""
    x = torch.tensor([-1.25, 1.25, 0.0, -1.2500001, 1.2500001], dtype=torch.float64)
    beta, gates = torch.tensor(1.25, dtype=torch.float64), torch.tensor(GATES["soft"], dtype=torch.float64)
    ours = _value_and_gradients(kernels.quantize, x, beta, gates, torch.ones(5), signed)
    theirs = _value_and_gradients(reference.quantize, x, beta, gates, torch.ones(5), signed)
    assert ours[1].tolist() == [float(signed), 1.0, 1.0, 0.0, 0.0]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=5e-14)


@SIGNS
@pytest.mark.parametrize("quantize", [reference.quantize, kernels.quantize], ids=["reference", "kernels"])
def test_straight_through_gradients_in_numbers(quantize, signed):
    """Inside the range d x_q / dx is 1 whatever the gates, outside it is 0; Euler's relation gives the range."""
    x, beta, gates, g = _inputs((400,), (), GATES["soft"])
    y, grad_x, grad_beta, _ = _value_and_gradients(quantize, x, beta, gates, g, signed)
    inside = (x <= beta) & (x >= (-beta if signed else 0.0))
    assert 20 < inside.sum() < 380
    torch.testing.assert_close(grad_x, torch.where(inside, g, 0.0), rtol=1e-13, atol=5e-14)
    expected = (g * (y - torch.where(inside, x, 0.0))).sum() / beta
    torch.testing.assert_close(grad_beta, expected, rtol=1e-12, atol=1e-13)


def test_clipped_elements_move_the_range_by_the_level_they_stand_on():
    """With all gates open that level is +-1 in units of the range, to 2^-32; a clipped weight recovers through it."""
    x = torch.tensor([-9.0, 9.0], dtype=torch.float64)
    for index, sign in enumerate([-1.0, 1.0]):
        beta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(kernels.quantize(x, beta, torch.ones(4))[index], beta)
        assert grad.item() == pytest.approx(sign, abs=1e-9)


@SIGNS
def test_gradient_of_the_gates_agrees_with_finite_differences(signed):
    x, beta, gates, g = _inputs((6, 8), (6, 1), GATES["one zero"])
    gates.requires_grad_()
    for quantize in (kernels.quantize, reference.quantize):
        assert torch.autograd.gradcheck(lambda z, f=quantize: f(x, beta, z, signed=signed) * g, gates)


@SIGNS
def test_gradient_along_the_ray_agrees_with_finite_differences(signed):
    """Scaling x and range together is smooth although rounding is not: gradcheck can judge that direction."""
    x, beta, gates, _ = _inputs((5, 6), (5, 1), GATES["soft"])
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    for quantize in (kernels.quantize, reference.quantize):
        assert torch.autograd.gradcheck(lambda t, f=quantize: f(t * x, t * beta, gates, signed=signed), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradients_keep_the_types_of_the_arguments(dtype):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    beta, gates = torch.tensor(1.0, requires_grad=True), torch.tensor(GATES["soft"], requires_grad=True)
    y = kernels.quantize(x, beta, gates)
    grads = torch.autograd.grad(y.sum(), (x, beta, gates))
    assert (y.dtype, *(grad.dtype for grad in grads)) == (dtype, dtype, torch.float32, torch.float32)
    full = kernels.quantize(x.detach().float(), beta, gates)
    assert torch.equal(y, full.to(dtype))


def test_arithmetic_is_single_precision_under_autocast():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    beta, gates = torch.tensor(1.7), torch.tensor(GATES["soft"])
    for quantize in (kernels.quantize, reference.quantize):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = quantize(x, beta, gates)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, quantize(x, beta, gates))


def test_non_contiguous_and_empty_tensors():
    x, beta, gates, _ = _inputs((6, 8), (), GATES["soft"])
    assert torch.equal(kernels.quantize(x.T, beta, gates), kernels.quantize(x, beta, gates).T)
    empty = torch.empty(0, 8, dtype=torch.float64, requires_grad=True)
    range_ = beta.clone().requires_grad_()
    y = kernels.quantize(empty, range_, gates)
    assert y.shape == (0, 8)
    assert torch.autograd.grad(y.sum(), range_)[0] == 0.0


def test_backward_keeps_nothing_but_its_inputs():
    """Five residuals of the size of a weight would be the largest tensors of a training step."""
    x, beta, gates, _ = _inputs((50, 40), (), GATES["soft"])
    saved = []
    leaves = [tensor.requires_grad_() for tensor in (x, beta, gates)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernels.quantize(*leaves)
    assert sum(tensor.numel() for tensor in saved if tensor.numel() >= x.numel()) == x.numel()


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_rows_of_a_range_are_found_without_ending_a_graph(shapes) -> None:
    def leading(x: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        rows = kernels.RangeRows(x, beta)
        return x.reshape(*rows.leading, -1) if rows.trailing else x.reshape(rows.leading)

    x, beta = (torch.zeros(shape) for shape in shapes)
    torch._dynamo.reset()
    compiled = torch.compile(leading, backend="eager", fullgraph=True)(x, beta)
    assert compiled.shape == leading(x, beta).shape
