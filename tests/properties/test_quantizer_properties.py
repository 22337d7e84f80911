"""What holds for every tensor, range and gate: scaling, symmetry, order, idempotence, bounds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankbits.gates import chain, hard_concrete
from rankbits.quant import kernels, reference
from rankbits.quant.codes import codes, round_to_grid, step_at
from rankbits.quant.grid import BIT_WIDTHS, bits_of_gates, expected_bits

QUANTIZERS = pytest.mark.parametrize("quantize", [reference.quantize, kernels.quantize], ids=["reference", "kernels"])
VALUES = st.lists(st.floats(-4.0, 4.0, width=32), min_size=1, max_size=12)
RANGES = st.floats(0.125, 8.0, width=32)
SOFT = st.lists(st.integers(0, 1024).map(lambda n: n / 1024), min_size=4, max_size=4)
WIDTHS = st.sampled_from(BIT_WIDTHS[:4])
LOGITS = st.floats(-12.0, 12.0)


def _double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _open_up_to(bits: int) -> torch.Tensor:
    return (torch.arange(4) < BIT_WIDTHS.index(bits)).double()


@QUANTIZERS
@given(VALUES, RANGES, SOFT, st.integers(-8, 8), st.booleans())
def test_scaling_values_and_range_scales_the_result(quantize, values, beta, gates, power, signed):
    """By powers of two, which change no rounding of the arithmetic itself."""
    scale = 2.0**power
    x, z = _double(values), _double(gates)
    y = quantize(x, _double(beta), z, signed=signed)
    assert torch.equal(quantize(scale * x, _double(scale * beta), z, signed=signed), scale * y)


@QUANTIZERS
@given(VALUES, RANGES, SOFT)
def test_a_signed_quantizer_is_odd(quantize, values, beta, gates):
    x, z = _double(values), _double(gates)
    assert torch.equal(quantize(-x, _double(beta), z), -quantize(x, _double(beta), z))


@QUANTIZERS
@given(VALUES, RANGES, WIDTHS, st.booleans())
def test_hard_gates_keep_the_order(quantize, values, beta, bits, signed):
    x = _double(values).sort().values
    y = quantize(x, _double(beta), _open_up_to(bits), signed=signed)
    assert (y.diff() >= -1e-12 * beta).all()
    assert (round_to_grid(x, _double(beta), bits, signed=signed).diff() >= 0).all()


@QUANTIZERS
@given(VALUES, RANGES, WIDTHS, st.booleans())
def test_rounding_twice_changes_nothing(quantize, values, beta, bits, signed):
    range_, z = _double(beta), _open_up_to(bits)
    once = quantize(_double(values), range_, z, signed=signed)
    torch.testing.assert_close(quantize(once, range_, z, signed=signed), once, rtol=0.0, atol=1e-14 * beta)
    flat = round_to_grid(_double(values), range_, bits, signed=signed)
    assert torch.equal(round_to_grid(flat, range_, bits, signed=signed), flat)


@given(VALUES, RANGES, WIDTHS, st.booleans())
def test_codes_of_their_own_values_are_themselves(values, beta, bits, signed):
    """Exporting a value that was decoded from codes gives the same codes, in single precision as well."""
    step = step_at(torch.tensor(beta), bits, signed=signed)
    k = codes(torch.tensor(values), step, bits, signed=signed)
    assert torch.equal(codes(step * k, step, bits, signed=signed), k)


@QUANTIZERS
@given(VALUES, RANGES, SOFT, st.booleans())
def test_values_stay_in_the_range_for_soft_gates(quantize, values, beta, gates, signed):
    y = quantize(_double(values), _double(beta), _double(gates), signed=signed)
    assert (y.abs() <= beta * (1.0 + 1e-15)).all()
    if not signed:
        assert (y >= -1e-15).all()


@QUANTIZERS
@given(VALUES, RANGES, st.booleans())
def test_more_bits_never_round_worse_than_their_half_step(quantize, values, beta, signed):
    x = _double(values)
    clipped = x.clamp(-beta if signed else 0.0, beta)
    for bits in BIT_WIDTHS[:4]:
        step = step_at(_double(beta), bits, signed=signed)
        error = (quantize(x, _double(beta), _open_up_to(bits), signed=signed) - clipped).abs()
        assert (error <= step / 2 * (1.0 + 1e-9)).all()


@given(VALUES, RANGES, SOFT, st.booleans())
def test_the_kernel_equals_the_reference(values, beta, gates, signed):
    x, range_, z = _double(values), _double(beta), _double(gates)
    ours = kernels.quantize(x, range_, z, signed=signed)
    torch.testing.assert_close(ours, reference.quantize(x, range_, z, signed=signed), rtol=0.0, atol=1e-14 * beta)


@QUANTIZERS
@given(VALUES, RANGES, SOFT, st.booleans())
def test_euler_s_relation_between_the_gradients(quantize, values, beta, gates, signed):
    """For L = sum of the results, x dL/dx + range dL/drange = L: homogeneity of degree one."""
    x, range_ = _double(values).requires_grad_(), _double(beta).requires_grad_()
    y = quantize(x, range_, _double(gates), signed=signed).sum()
    grad_x, grad_range = torch.autograd.grad(y, (x, range_))
    euler = (x * grad_x).sum() + range_ * grad_range
    torch.testing.assert_close(euler, y, rtol=1e-10, atol=1e-10)


@given(LOGITS, LOGITS)
def test_probability_of_being_open_rises_with_the_logit(first, second):
    low, high = sorted((first, second))
    for view in (hard_concrete.open_probability, hard_concrete.saturated_probability, hard_concrete.mean):
        assert view(_double(low)) <= view(_double(high))
    assert hard_concrete.is_open(_double(low)) <= hard_concrete.is_open(_double(high))


@given(LOGITS, st.floats(1e-6, 1.0 - 1e-6))
def test_samples_are_in_the_unit_interval(logit, noise):
    z = hard_concrete.sample(_double(logit), _double(noise))
    assert 0.0 <= z <= 1.0


@given(SOFT, st.floats(1e-3, 50.0))
def test_divergence_is_not_negative(probabilities, strength):
    assert chain.kl_nats(_double(probabilities), strength) >= -1e-12


@given(SOFT)
def test_products_fall_along_the_chain_and_bits_stay_between_2_and_32(probabilities):
    links = chain.cumulative(_double(probabilities))
    assert (links.diff() <= 0).all()
    assert 2.0 <= expected_bits(links) <= 32.0
    gates = chain.round_straight_through(links).bool()
    assert torch.equal(chain.hard(gates), gates)
    assert bits_of_gates(gates).item() in BIT_WIDTHS
