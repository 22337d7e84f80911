"""Products with sampled weight gradients and token-wise low-rank gradients, against plain autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rankbits.tuners.bayesian_lora.products import LowRankUpdate, linear, merged_linear

T, INPUTS, OUTPUTS, RANK, SCALE = 6, 7, 4, 2, 2.5


def _tensors(dtype=torch.float64, rows=(T,)):
    generator = torch.Generator().manual_seed(0)
    shapes = ((*rows, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS,), (RANK, INPUTS), (RANK,), (OUTPUTS, RANK))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def _merged(x, base, bias, down, diagonal, up, *, rows=None):
    """The layer that the product is made for, without its rounding."""
    weight = base + SCALE * (up * diagonal).detach() @ down.detach()
    return merged_linear(x, weight, bias, LowRankUpdate(down, diagonal, up, SCALE), rows=rows)


def _composed(x, base, bias, down, diagonal, up):
    return F.linear(x, base + SCALE * (up * diagonal) @ down, bias)


def _gradients(function, tensors, **keywords):
    y = function(*tensors, **keywords)
    return (y.detach(), *torch.autograd.grad((y * torch.sin(y.detach())).sum(), tensors))


def _linear(x, weight, bias, *, rows=None):
    return linear(x, weight, bias, rows=rows)


@pytest.mark.parametrize("rows", [None, T, T + 5])
@pytest.mark.parametrize("shape", [(T,), (2, 3), (1, 3, 2)])
def test_all_rows_give_the_gradients_of_plain_autograd(shape, rows):
    x, weight, bias, *factors = _tensors(rows=shape)
    for ours, theirs in zip(
        _gradients(_linear, (x, weight, bias), rows=rows), _gradients(F.linear, (x, weight, bias)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    tensors = (x, weight, bias, *factors)
    for ours, theirs in zip(_gradients(_merged, tensors, rows=rows), _gradients(_composed, tensors), strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_gradcheck():
    tensors = _tensors()
    assert torch.autograd.gradcheck(lambda *t: linear(*t, rows=None), tensors[:3])
    # The factors reach the weight detached, so what moves with them is not what finite differences see: fix it.
    weight, (x, base, bias, *_) = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64), tensors
    update = LowRankUpdate(*(t.detach() for t in tensors[3:]), SCALE)
    assert torch.autograd.gradcheck(lambda x, w, b: merged_linear(x, weight + w, b, update, rows=None), (x, base, bias))


def test_the_factors_are_trained_by_every_row_whatever_the_sample():
    tensors = _tensors()
    _, *sampled = _gradients(_merged, tensors, rows=1)
    _, *whole = _gradients(_merged, tensors)
    for index, (ours, theirs) in enumerate(zip(sampled, whole, strict=True)):
        assert torch.equal(ours, theirs) is (index != 1)  # the weight alone is estimated


def test_a_weight_without_update_is_left_to_the_caller():
    """The gradient of the weight must not reach A, E and B a second time."""
    x, base, bias, *factors = _tensors()
    update = LowRankUpdate(*factors, SCALE)
    (grad,) = torch.autograd.grad(merged_linear(x, base, bias, update, rows=None).sum(), base)
    torch.testing.assert_close(grad, x.sum(0).expand(OUTPUTS, INPUTS))


@pytest.mark.parametrize("product", [_linear, _merged])
def test_one_sampled_row_is_unbiased_exactly(product):
    """With S = 1 there are T outcomes, T g_i x_i^T each; their mean is the whole gradient."""
    tensors = _tensors()[: 3 if product is _linear else 6]
    _, _, whole, *_ = _gradients(product, tensors)
    outcomes = {}
    for seed in range(100):
        torch.manual_seed(seed)
        _, _, sampled, *_ = _gradients(product, tensors, rows=1)
        outcomes[tuple(sampled.flatten().tolist())] = sampled
    assert len(outcomes) == T
    torch.testing.assert_close(torch.stack(list(outcomes.values())).mean(0), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("product", [_linear, _merged])
def test_sampled_rows_are_unbiased_on_the_mean(product):
    """Within 4.5 standard errors of 2,000 draws, which are those of sampling without replacement."""
    torch.manual_seed(0)
    x, *_ = tensors = _tensors()[: 3 if product is _linear else 6]
    y, _, whole, *_ = _gradients(product, tensors)
    draws = torch.stack([_gradients(product, tensors, rows=2)[2] for _ in range(2000)])
    terms = T * torch.sin(y)[:, :, None] * x.detach()[:, None, :]  # [T, out, in]
    variance = terms.var(dim=0) / 2 * (1 - 2 / T)
    assert ((draws.mean(0) - whole).abs() <= 4.5 * (variance / 2000).sqrt()).all()
    torch.testing.assert_close(draws.var(dim=0).sum(), variance.sum(), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("rows", [0, -3])
def test_no_rows_are_refused(rows):
    with pytest.raises(ValueError, match=f"`rows`={rows}: .* at least one row"):
        linear(*_tensors()[:3], rows=rows)


def test_frozen_weights_and_inputs_cost_no_product():
    x, weight, bias, *_ = _tensors()
    weight, x = weight.detach(), x.detach()
    with torch.profiler.profile() as profile:
        y = linear(x, weight, bias, rows=2)
        y.sum().backward()
    assert not any(event.key == "aten::mm" for event in profile.key_averages())
    torch.testing.assert_close(bias.grad, torch.full((OUTPUTS,), float(T), dtype=torch.float64))


@pytest.mark.parametrize("rows", [None, 2])
def test_of_the_input_only_the_sampled_rows_are_kept(rows):
    x, weight, bias, *_ = _tensors(rows=(2, 50))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x, weight, bias, rows=rows)
    kept = [t.shape for t in saved if t.dtype == x.dtype and t.shape[-1] == INPUTS and t.shape != weight.shape]
    assert kept == [(2, 50, INPUTS) if rows is None else (2, INPUTS)]


def test_the_merged_product_keeps_one_input_and_adds_none_to_the_forward_pass():
    tensors = _tensors(rows=(2, 50))
    saved = []
    with (
        torch.profiler.profile() as profile,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        x, base, bias, *factors = tensors
        merged_linear(x, base, bias, LowRankUpdate(*factors, SCALE), rows=3)
    assert sum(t.numel() for t in saved if t.numel() >= x.numel()) == x.numel()
    assert sum(event.count for event in profile.key_averages() if event.key in {"aten::mm", "aten::addmm"}) == 1


class _Block(torch.nn.Module):
    """Sampled rows between two draws of dropout, with a weight that has a graph only where gradients are enabled."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.weight, self.bias, *self.factors = (torch.nn.Parameter(t.detach()) for t in _tensors()[1:])
        for index, factor in enumerate(self.factors):
            self.register_parameter(f"factor{index}", factor)
        self.merged = merged
        self.chosen = []

    def forward(self, x):
        x = F.dropout(x, 0.3)
        weight = self.weight * 1.5
        if self.merged:
            y = merged_linear(x, weight, self.bias, LowRankUpdate(*self.factors, SCALE), rows=2)
        else:
            y = linear(x, weight, self.bias, rows=2)
        return F.dropout(y, 0.3).sin()


@pytest.mark.parametrize("merged", [False, True], ids=["separate", "merged"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_recomputation_replays_the_sample_and_all_that_is_drawn_after_it(reentrant, merged):
    results = []
    for use in (None, reentrant):
        block = _Block(merged)
        x = _tensors()[0]
        torch.manual_seed(3)
        y = block(x) if use is None else checkpoint(block, x, use_reentrant=use)
        following = torch.rand(())
        y.square().sum().backward()
        results.append((y.detach(), following, x.grad, *(p.grad for p in block.parameters())))
    for plain, recomputed in zip(*results, strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or torch.equal(plain, recomputed)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(backward_inside):
    """The types and, to the resolution of bfloat16, the values of what autocast makes of the plain composition."""
    results = []
    for function in (_merged, _composed):
        tensors = _tensors(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(*tensors)
            if backward_inside:
                y.float().sum().backward()
        if not backward_inside:
            y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert all(t.grad.dtype == torch.float32 for t in tensors)
        results.append([y.detach(), *(t.grad for t in tensors)])
    for ours, theirs in zip(*results, strict=True):
        scale = theirs.float().abs().max()
        assert ((ours - theirs).float().abs() <= 2.0**-6 * scale).all()


def test_autocast_leaves_double_precision_alone():
    x, weight, bias, *_ = _tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias, rows=2).dtype == torch.float64


def test_an_expanded_gradient_and_a_missing_bias():
    x, weight, _, *_ = _tensors(rows=(2, 3))
    grads = torch.autograd.grad(linear(x, weight, None, rows=None).sum(), (x, weight))
    expected = torch.autograd.grad(F.linear(x, weight).sum(), (x, weight))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_compiled_without_a_graph_break():
    def loss(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            merged = _merged(*tensors, rows=2)
        return merged.float().sum() + linear(*tensors[:3], rows=2).sum()

    tensors = _tensors(torch.float32)
    eager = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors)
    for index, (ours, theirs) in enumerate(zip(compiled, eager, strict=True)):
        if index != 1:  # the weight's is another sample
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)
    assert compiled[1].shape == eager[1].shape
    assert compiled[1].any()
