"""Fusing the kernels: the real compiler, the eager fallback that says why, and the switch that keeps it silent."""

import warnings

import pytest
import torch
from torch._dynamo.utils import counters

from rankbits.errors import RankbitsWarning
from rankbits.quant import kernels, reference


def _raise(*_):
    raise RuntimeError("no C++ compiler\n\na stack trace\n")


@pytest.fixture
def compiling(monkeypatch):
    """The switch left alone, and kernels that no other test has compiled or failed to compile."""
    monkeypatch.delenv(kernels.COMPILE_SWITCH, raising=False)
    monkeypatch.setattr(kernels, "_forward", kernels.Fused(kernels.quantize_forward))
    monkeypatch.setattr(kernels, "_backward", kernels.Fused(kernels.quantize_backward))
    return monkeypatch


ARGUMENTS = (torch.ones(1, 3), torch.ones(1, 1), torch.zeros(4), True)
"""Of `quantize_forward`: values, steps, links, signed."""
COMPILES = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
"""PyTorch's compiler imports parts of PyTorch that PyTorch calls deprecated."""


def _inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 40, generator=generator).to(dtype)
    return x, torch.tensor([0.8, 0.5, 0.6, 0.4]), torch.randn(12, 40, generator=generator).to(dtype)


def test_a_failing_compiler_warns_once_with_its_reason_and_eager_code_goes_on(compiling):
    fused = kernels.Fused(kernels.quantize_forward)
    compiling.setattr(fused, "compiled", _raise)
    expected = kernels.quantize_forward(*ARGUMENTS)
    with pytest.warns(RankbitsWarning) as caught:
        assert torch.equal(fused(*ARGUMENTS), expected)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "quantize_forward runs without fusion" in message
    assert "RuntimeError: no C++ compiler. " in message
    assert "stack trace" not in message
    assert "RANKBITS_COMPILE=0" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fused(*ARGUMENTS), expected)


def test_the_warning_names_the_cause_that_pytorch_wraps(compiling):
    def fail(*_):
        raise RuntimeError(
            "backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found\n\nSet TORCH_LOGS"
        )

    fused = kernels.Fused(kernels.quantize_forward)
    compiling.setattr(fused, "compiled", fail)
    with pytest.warns(RankbitsWarning) as caught:
        fused(*ARGUMENTS)
    assert "InvalidCxxCompiler: No working C++ compiler found" in str(caught[0].message)


def test_a_failure_without_a_message_is_still_a_failure_of_the_compiler(compiling):
    def fail(*_):
        raise OSError

    fused = kernels.Fused(kernels.quantize_forward)
    compiling.setattr(fused, "compiled", fail)
    with pytest.warns(RankbitsWarning, match=r"failed: OSError: \. "):
        fused(*ARGUMENTS)


def test_a_mistake_in_the_arguments_is_not_blamed_on_the_compiler(compiling):
    fused = kernels.Fused(kernels.quantize_forward)
    compiling.setattr(fused, "compiled", _raise)
    with pytest.raises(TypeError, match="missing 3 required positional arguments"):
        fused(torch.ones(1, 3))
    assert fused.compiled is not None


def test_both_kernels_fall_back(compiling):
    compiling.setattr(kernels._forward, "compiled", _raise)
    compiling.setattr(kernels._backward, "compiled", _raise)
    x = torch.ones(3, requires_grad=True)
    with pytest.warns(RankbitsWarning, match="quantize_forward"):
        y = kernels.quantize(x, torch.tensor(2.0), torch.ones(4))
    with pytest.warns(RankbitsWarning, match="quantize_backward"):
        y.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


def test_the_switch_keeps_eager_code_without_a_word(monkeypatch):
    monkeypatch.setenv("RANKBITS_COMPILE", "0")
    fused = kernels.Fused(kernels.quantize_forward)
    monkeypatch.setattr(fused, "compiled", _raise)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(*ARGUMENTS)
    assert fused.compiled is _raise


def test_inside_a_model_that_is_itself_compiled_the_plain_function_is_traced(compiling):
    fused = kernels.Fused(kernels.quantize_forward)
    compiling.setattr(fused, "compiled", lambda *_: "compiled")
    compiling.setattr(torch.compiler, "is_compiling", lambda: True)
    assert isinstance(fused(*ARGUMENTS), torch.Tensor)


def test_the_compiled_function_is_used_where_there_is_one(compiling):
    fused = kernels.Fused(kernels.quantize_forward)
    compiling.setattr(fused, "compiled", lambda *_: "compiled")
    assert fused(*ARGUMENTS) == "compiled"


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize(("dtype", "signed"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_compiled_kernels_equal_the_reference_up_to_ties(compiling, dtype, signed):
    x, gates, g = _inputs(dtype)
    for shape in ((), (12, 1)):
        beta = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
        results = []
        for quantize in (kernels.quantize, reference.quantize):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, beta, gates)]
            y = quantize(*leaves, signed=signed)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, g)))
        ours, theirs = results
        assert kernels._forward.compiled is not None
        assert kernels._backward.compiled is not None
        # One level of the first gated grid is the most that one broken tie may cost; hardly any element has one.
        unit = 2.0**-7 if dtype == torch.bfloat16 else 4e-6
        assert ((ours[0] - theirs[0]).float().abs() > unit * 2.0).float().mean() < 0.01
        assert (ours[0] - theirs[0]).float().abs().max() <= 2.0 * 1.5 / 15
        torch.testing.assert_close(ours[1], theirs[1], rtol=2.0 * unit, atol=2.0 * unit)
        torch.testing.assert_close(ours[2], theirs[2], rtol=0.02, atol=0.05)
        torch.testing.assert_close(ours[3], theirs[3], rtol=0.02, atol=0.05)


@pytest.mark.slow
@COMPILES
def test_few_graphs_serve_many_shapes(compiling):
    """Parameters, several ranks and tensors with history would cost one graph each, and eight are the limit."""
    torch._dynamo.reset()
    counters.clear()
    beta, gates = torch.nn.Parameter(torch.tensor(1.2)), torch.full((4,), 0.5, requires_grad=True)
    for shape in ((64,), (8, 16), (3, 5, 7), (2, 3, 4, 6), (33, 9), (128, 3)):
        for leaf in (
            torch.randn(shape),
            torch.randn(shape, requires_grad=True),
            torch.nn.Parameter(torch.randn(shape)),
        ):
            y = kernels.quantize(leaf, beta, gates)
            y.sum().backward()
    assert counters["stats"]["unique_graphs"] == 2  # one forward, one backward
    assert kernels._forward.compiled is not None
