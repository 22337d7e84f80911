"""Fused rounding at one width gives the very numbers of the eager code that evaluation and exporters run."""

import pytest
import torch
from torch._dynamo.utils import counters

from rankbits.quant import codes, kernels

ROWS, COLUMNS, GROUP = 1024, 1024, 64
INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
GRIDS = pytest.mark.parametrize(
    "grid", [{"signed": True}, {"signed": False}, {"full": True}], ids=["signed", "unsigned", "full"]
)
COMPILES = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture
def compiling(monkeypatch):
    """The switch left alone, and functions that no other test has compiled or failed to compile."""
    monkeypatch.delenv(kernels.COMPILE_SWITCH, raising=False)
    torch._dynamo.reset()
    for name in ("_forward", "_backward", "_mask"):
        monkeypatch.setattr(codes, name, kernels.Fused(getattr(codes, name).eager))
    return monkeypatch


def _ranges(shape, dtype, grid):
    """Between 0.5 and 1.5; where the grid is full, on either side of zero."""
    generator = torch.Generator().manual_seed(1)
    ranges = (torch.rand(shape, generator=generator) + 0.5).to(dtype)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -ranges, ranges) if "full" in grid else ranges


def _values(dtype, beta, step):
    """A million normal values; a million ties; the edges of the range, beside them, and of a full one; odd numbers."""
    shape = (ROWS, COLUMNS // GROUP, GROUP) if beta.dim() == 3 else (ROWS, COLUMNS)
    yield torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    order = torch.arange(ROWS * COLUMNS).reshape(shape)
    yield ((order % 1001 - 500 + 0.5) * step).to(dtype)
    edges = torch.where(order % 2 == 0, beta, -beta)
    for beside in (edges, torch.nextafter(edges, 2 * edges), torch.nextafter(edges, 0 * edges)):
        yield beside.to(dtype)
    yield (-beta - step).expand(shape).to(dtype)
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 1e-38, 3e38])
    yield odd.repeat(ROWS * COLUMNS // 9 + 1)[: ROWS * COLUMNS].reshape(shape).to(dtype)


@pytest.mark.slow
@COMPILES
@GRIDS
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_fused_rounding_equals_eager_rounding(compiling, dtype, grid):
    computing = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((), (ROWS, 1), (ROWS, COLUMNS // GROUP, 1)):
        for bits in (2, 4, 8, 16, 32):
            beta = _ranges(shape, computing, grid)
            for x in _values(dtype, beta, codes.step_at(beta, bits, signed=grid.get("signed", True))):
                with torch.no_grad():
                    expected = codes.round_to_grid(x, beta, bits, **grid)
                fused = codes.round_to_grid(x, beta, torch.tensor(bits), **grid)
                same = fused.view(INTEGERS[dtype]) == expected.view(INTEGERS[dtype])
                # The compiler may drop the sign of a zero, which is one code all the same; NaN has many patterns.
                same |= (fused == 0) & (expected == 0) | fused.isnan() & expected.isnan()
                assert same.all(), (shape, bits)
    assert codes._forward.compiled is not None


@pytest.mark.slow
@COMPILES
@GRIDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_gradients_equal_eager_ones(compiling, dtype, grid):
    """Those of the values exactly, those of the range, which are sums in another order, to rounding."""
    for shape in ((), (ROWS, 1), (ROWS, COLUMNS // GROUP, 1)):
        beta = _ranges(shape, torch.float32, grid)
        for bits in (2, 4, 8, 16, 32):
            for x in _values(dtype, beta, codes.step_at(beta, bits, signed=grid.get("signed", True))):
                g = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
                results = []
                for switch in ("0", "1"):
                    compiling.setenv(kernels.COMPILE_SWITCH, switch)
                    leaves = [x.clone().requires_grad_(), beta.clone().requires_grad_()]
                    results.append(torch.autograd.grad(codes.round_to_grid(*leaves, bits, **grid), leaves, g))
                    (alone,) = torch.autograd.grad(codes.round_to_grid(leaves[0], beta, bits, **grid), leaves[0], g)
                    assert torch.equal(alone, results[-1][0])
                (eager_x, eager_beta), (fused_x, fused_beta) = results
                assert torch.equal(fused_x, eager_x)
                scale = torch.nan_to_num(eager_beta).abs().max().clamp(min=1.0)
                torch.testing.assert_close(fused_beta, eager_beta, rtol=1e-4, atol=1e-4 * float(scale), equal_nan=True)
    assert all(function.compiled is not None for function in (codes._forward, codes._backward, codes._mask))


@pytest.mark.slow
@COMPILES
def test_few_graphs_serve_many_shapes_and_every_width(compiling):
    """A width is a value and not a graph: one graph for a range per tensor, one for finer ranges, of each function."""
    counters.clear()
    for bits in (2, 8, torch.tensor(4), torch.tensor(32)):
        for grid in ({"signed": True}, {"signed": False}, {"full": True}):
            for shape in ((64,), (8, 16), (3, 5, 7), (2, 3, 4, 6), (33, 9)):
                for range_shape in ((), (shape[0], *(1,) * (len(shape) - 1))):
                    if len(shape) == 1 and range_shape:
                        continue
                    beta = torch.ones(range_shape, requires_grad=True)
                    for range_ in (beta, beta.detach()):
                        x = torch.randn(shape, requires_grad=True)
                        codes.round_to_grid(x, range_, bits, **grid).sum().backward()
    assert counters["stats"]["unique_graphs"] == 6
    assert codes._forward.compiled is not None


def test_without_gradients_the_eager_code_runs(compiling):
    """Evaluation, merging and exporters wait for no compiler."""
    for name in ("_forward", "_backward", "_mask"):
        compiling.setattr(codes, name, None)
    with torch.no_grad():
        assert codes.round_to_grid(torch.tensor([0.3]), torch.tensor(1.0), 2).item() == 0.0


def test_other_devices_run_the_eager_code(compiling):
    """Their compilers divide approximately, and a quotient near a tie would round the other way."""
    compiling.setattr(codes, "_forward", None)
    x = torch.ones(3, device="meta", requires_grad=True)
    assert codes.round_to_grid(x, torch.ones((), device="meta"), 4).device.type == "meta"


def test_a_frozen_range_costs_no_rounding_in_backward(monkeypatch):
    monkeypatch.setattr(codes, "_backward", None)
    x = torch.tensor([-3.0, 0.2, 3.0], requires_grad=True)
    codes.round_to_grid(x, torch.tensor(1.0), 4).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 0.0]
