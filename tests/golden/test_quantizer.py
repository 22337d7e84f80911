"""The quantizers give the values and gradients of exact rational arithmetic, to the rounding of float64."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from rankbits.quant import kernels, reference
from rankbits.quant.codes import codes, round_to_grid, step_at

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "quantizer.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-14
"""Relative to the range: about 45 roundings of float64."""


def _column(name: str) -> torch.Tensor:
    return torch.tensor([case[name] for case in GOLDEN], dtype=torch.float64)


def _gradients(quantize, case):
    x = torch.tensor(case["x"], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(case["range"], dtype=torch.float64, requires_grad=True)
    gates = torch.tensor(case["gates"], dtype=torch.float64, requires_grad=True)
    value = quantize(x, beta, gates, signed=case["signed"])
    return value.detach(), torch.autograd.grad(value, (x, beta, gates))


def test_the_file_is_what_its_generator_prints():
    spec = importlib.util.spec_from_file_location("make_quantizer", HERE / "make_quantizer.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.golden() == GOLDEN


@pytest.mark.parametrize("quantize", [reference.quantize, kernels.quantize], ids=["reference", "kernels"])
def test_values_and_gradients(quantize):
    results = [_gradients(quantize, case) for case in GOLDEN]
    scale = _column("range")
    error = (torch.stack([value for value, _ in results]) - _column("value")).abs()
    assert (error <= TOLERANCE * scale).all()
    assert torch.equal(torch.stack([grads[0] for _, grads in results]), _column("grad_x"))
    error = (torch.stack([grads[1] for _, grads in results]) - _column("grad_range")).abs()
    assert error.max() <= TOLERANCE


@pytest.mark.parametrize("quantize", [reference.quantize, kernels.quantize], ids=["reference", "kernels"])
def test_gradient_of_a_gate_is_its_residual_times_the_gates_around_it(quantize):
    for case in GOLDEN:
        _, (_, _, grad) = _gradients(quantize, case)
        gates, residuals = case["gates"], case["residuals"]
        expected = []
        for index in range(4):
            tail = 0.0
            for gate, residual in reversed(list(zip(gates[index:], residuals[index:], strict=True))):
                tail = (gate if residual is not residuals[index] else 1.0) * (residual + tail)
            before = 1.0
            for gate in gates[:index]:
                before *= gate
            expected.append(before * tail)
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(grad, expected, rtol=0.0, atol=TOLERANCE * case["range"])


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_codes(bits):
    for case in GOLDEN:
        x, beta = torch.tensor([case["x"], case["range"]], dtype=torch.float64)
        step = step_at(beta, bits, signed=case["signed"])
        code = codes(x, step, bits, signed=case["signed"])
        assert code.item() == case["codes"][str(bits)], case
        levels = 2**bits - 1
        assert step.item() == pytest.approx((2 if case["signed"] else 1) * case["range"] / levels, rel=1e-15)
        assert torch.equal(round_to_grid(x, beta, bits, signed=case["signed"]), step * code)
