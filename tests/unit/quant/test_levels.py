"""What the grids contain: how many levels, nested, inside the range, and exact at its edges in every input type."""

import pytest
import torch

from rankbits.quant import kernels, reference
from rankbits.quant.codes import codes, round_to_grid, step_at
from rankbits.quant.grid import BIT_WIDTHS

WIDTHS = pytest.mark.parametrize("bits", BIT_WIDTHS[:4])
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
RECURSIONS = pytest.mark.parametrize("quantize", [reference.quantize, kernels.quantize], ids=["reference", "kernels"])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
RANGES = 10_000


def _open_up_to(bits: int) -> torch.Tensor:
    return (torch.arange(4) < BIT_WIDTHS.index(bits)).to(torch.float32)


def _random_ranges() -> torch.Tensor:
    """Log-uniform over 1e-4 .. 1e4."""
    generator = torch.Generator().manual_seed(0)
    return 10.0 ** (torch.rand(RANGES, generator=generator) * 8.0 - 4.0)


def _largest_code(bits: int, signed: bool) -> int:
    return 2 ** (bits - 1) - 1 if signed else 2**bits - 1


def _level_count(bits: int, signed: bool) -> int:
    return 2**bits - 1 if signed else 2**bits


def _sweep() -> torch.Tensor:
    """Values over and beyond the range 1, denser than the 16-bit grid."""
    return torch.linspace(-1.3, 1.3, 400_001, dtype=torch.float64)


@SIGNS
@WIDTHS
def test_number_of_levels_of_codes(bits, signed):
    x = _sweep()
    k = codes(x, step_at(torch.tensor(1.0, dtype=torch.float64), bits, signed=signed), bits, signed=signed)
    assert k.unique().numel() == _level_count(bits, signed)
    assert k.max() == _largest_code(bits, signed)
    assert k.min() == (-_largest_code(bits, signed) if signed else 0)


@SIGNS
@WIDTHS
@RECURSIONS
def test_number_of_levels_of_hard_gates(quantize, bits, signed):
    values = quantize(_sweep(), torch.tensor(1.0), _open_up_to(bits), signed=signed)
    step = step_at(torch.tensor(1.0, dtype=torch.float64), bits, signed=signed)
    quotient = values / step
    assert (quotient - quotient.round()).abs().max() < 1e-9
    assert quotient.round().unique().numel() == _level_count(bits, signed)


@SIGNS
@pytest.mark.parametrize(("coarse", "fine"), [(2, 4), (4, 8), (8, 16)])
def test_each_grid_contains_the_coarser_one(coarse, fine, signed):
    beta = torch.tensor(0.73, dtype=torch.float64)
    levels = round_to_grid(_sweep(), beta, coarse, signed=signed).unique()
    torch.testing.assert_close(round_to_grid(levels, beta, fine, signed=signed), levels, rtol=1e-15, atol=0.0)


@SIGNS
@WIDTHS
@RECURSIONS
def test_open_gates_equal_direct_rounding_up_to_ties(quantize, bits, signed):
    generator = torch.Generator().manual_seed(1)
    x, beta = torch.randn(200_000, generator=generator), torch.tensor(2.5)
    step = step_at(beta, bits, signed=signed)
    direct = codes(x, step, bits, signed=signed)
    recursive = torch.round(quantize(x, beta, _open_up_to(bits), signed=signed) / step)
    difference = (direct - recursive).abs()
    assert difference.max() <= 1
    # A code of 16 bits is within 2^-24 * 2^16 of a tie once in some hundred elements; coarser ones hardly ever.
    assert (difference > 0).double().mean() <= {2: 0.0, 4: 1e-5, 8: 1e-4, 16: 2e-3}[bits]
    quotient = x / step
    tie = (quotient - quotient.floor() - 0.5).abs() <= 2.0**bits * 2.0**-22
    assert not (difference > 0)[~tie].any()


@SIGNS
@WIDTHS
@TYPES
@pytest.mark.parametrize("edge", [1.0, -1.0])
def test_edges_of_the_range_have_the_last_code(bits, signed, dtype, edge):
    """BayesianBits clips at (1 - 1e-7) range to keep a tie from breaking outwards; in half precision that is 1."""
    x = (_random_ranges() * edge).to(dtype)
    beta = x.abs().to(torch.float32)
    beta, x = beta[beta > 0], x[beta > 0]
    assert beta.numel() > RANGES * 0.99
    expected = _largest_code(bits, signed) * (edge if signed or edge > 0 else 0.0)
    step = step_at(beta, bits, signed=signed)
    assert (codes(x, step, bits, signed=signed) == expected).all()
    for quantize in (reference.quantize, kernels.quantize):
        y = quantize(x.to(torch.float32), beta, _open_up_to(bits), signed=signed)
        assert (torch.round(y / step) == expected).all()
        # The type of the input rounds monotonically: what did not exceed the range does not exceed it there.
        narrow = quantize(x, beta, _open_up_to(bits), signed=signed)
        assert narrow.dtype == dtype
        assert torch.equal(narrow, y.to(dtype))


def test_half_precision_cannot_express_a_guard_inside_the_range():
    assert torch.tensor(1.0 - 1e-7).to(torch.bfloat16) == 1.0
    assert torch.tensor(1.0 - 1e-7).to(torch.float16) == 1.0


@SIGNS
@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("edge", [1.0, -1.0, 1.7, -1.7])
def test_no_value_leaves_the_range(bits, signed, edge):
    """Signed levels stay strictly inside.

    At the top of an unsigned grid three thirds may be one unit in the last place more than the whole, because the value
    is the product of step and code.
    """
    beta = _random_ranges()
    x = beta * edge
    last_place = torch.nextafter(beta, torch.tensor(torch.inf))
    flat = round_to_grid(x, beta, bits, signed=signed)
    soft = torch.tensor([0.9, 0.6, 0.3, 0.8])
    for y in (
        flat,
        *(
            f(x, beta, g, signed=signed)
            for f in (reference.quantize, kernels.quantize)
            for g in (_open_up_to(bits), soft)
        ),
    ):
        assert (y.abs() <= last_place).all()
        if not signed:
            assert (y >= 0).all()
    if signed:
        assert (flat.abs() <= beta).all()
    if signed and bits <= 16:
        assert (flat.abs() < beta).all()
        assert (kernels.quantize(x, beta, _open_up_to(bits)).abs() < beta).all()
        assert (reference.quantize(x, beta, _open_up_to(bits)).abs() < beta).all()


@WIDTHS
def test_a_value_in_the_middle_of_the_extended_range_is_exact_at_every_width(bits):
    """A constant tensor under a range of 1.5 times its size."""
    beta = torch.tensor(1.5)
    assert codes(torch.ones(1), step_at(beta, bits), bits).item() == {2: 1, 4: 5, 8: 85, 16: 21845}[bits]
    for value in (
        round_to_grid(torch.ones(3), beta, bits),
        kernels.quantize(torch.ones(3), beta, _open_up_to(bits)),
        reference.quantize(torch.ones(3), beta, _open_up_to(bits)),
    ):
        torch.testing.assert_close(value, torch.ones(3), rtol=2e-7, atol=0.0)


@SIGNS
@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_largest_value_of_each_width(bits, signed):
    top = round_to_grid(torch.tensor(9.0, dtype=torch.float64), torch.tensor(1.0), bits, signed=signed).item()
    published = {2: 0.6667, 4: 0.9333, 8: 0.99608, 16: 0.999985, 32: 1.0}
    assert top == pytest.approx(published[bits] if signed else 1.0, abs=5e-6 if bits > 4 else 5e-5)
