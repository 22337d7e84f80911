"""The table of widths, divisors and steps, and that no step is ever zero."""

import pytest
import torch

from rankbits.quant import grid


def test_published_constants():
    assert grid.BIT_WIDTHS == (2, 4, 8, 16, 32)
    assert grid.GATED_WIDTHS == (4, 8, 16, 32)
    assert grid.STEP_DIVISORS == (5, 17, 257, 65537)
    assert grid.RESIDUAL_BOUNDS == (2, 8, 128, 32768)
    assert grid.COARSEST_CODES == {True: (-1, 1), False: (0, 3)}
    assert grid.UNROUNDED_WIDTH == 32


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_arithmetic_is_single_precision_except_for_double(given, computed):
    assert grid.compute_dtype(given) == computed


def test_coarsest_step():
    beta = torch.tensor([3.0, 0.75])
    assert grid.coarsest_step(beta, signed=True).tolist() == [2.0, 0.5]
    assert grid.coarsest_step(beta, signed=False).tolist() == [1.0, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_held_at_the_smallest_normal_number(dtype):
    tiny = torch.finfo(dtype).tiny
    steps = torch.tensor([0.0, tiny / 4, tiny, 1.0], dtype=dtype)
    assert grid.hold_step(steps).tolist() == [tiny, tiny, tiny, 1.0]
    assert grid.hold_step(-steps[2:]).tolist() == [-tiny, -1.0]
    assert grid.hold_step(-steps[1:2]).item() == -tiny
    assert grid.coarsest_step(torch.tensor(0.0, dtype=dtype), signed=True) == tiny


def test_expected_bits_weighs_each_link_with_what_it_adds():
    for index, gain in enumerate([2.0, 4.0, 8.0, 16.0]):
        links = torch.zeros(4)
        links[index] = 0.5
        assert grid.expected_bits(links).item() == 2.0 + gain / 2
    assert grid.expected_bits(torch.ones(3, 2, 4)).tolist() == [[32.0, 32.0]] * 3


def test_bits_of_gates_keeps_leading_dimensions():
    gates = torch.tensor([[False] * 4, [True, False, False, False], [True] * 2 + [False] * 2, [True] * 4])
    bits = grid.bits_of_gates(gates)
    assert bits.dtype == torch.int64
    assert bits.tolist() == [2, 4, 8, 32]


def test_signedness_is_also_its_configuration_value():
    assert [member.value for member in grid.Signedness] == ["signed", "unsigned", "auto", "affine"]
    assert grid.Signedness("auto") is grid.Signedness.AUTO
