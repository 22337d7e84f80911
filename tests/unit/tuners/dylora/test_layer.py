"""The layer computes the paper's formula at every rank, trains what a step may train, and becomes exact LoRA."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankbits import DyloraConfig, set_rank
from rankbits.errors import RankbitsWarning
from rankbits.tuners.dylora import DyloraLinear, adapted_layers


def _only(model: nn.Module) -> DyloraLinear:
    ((_, layer),) = adapted_layers(model)
    return layer


def _dense(layer: DyloraLinear, x: torch.Tensor, rank: int, alpha: float) -> torch.Tensor:
    """Algorithm 1 in float64: the sum of the first `rank` outer products, scaled by alpha / rank."""
    weight = layer.oriented(layer.get_base_layer().weight).detach().double()
    bias = layer.bias.detach().double()
    down, up = layer.dylora_down["default"].detach().double(), layer.dylora_up["default"].detach().double()
    update = sum(torch.outer(up[:, i], down[i]) for i in range(rank)) * (alpha / rank)
    return x.double() @ (weight + update).T + bias


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_output_is_the_formula_at_every_rank(dylora, rank, kind) -> None:
    base = nn.Sequential(nn.Linear(12, 10) if kind == "linear" else Conv1D(10, 12))
    model = dylora(base, target_modules=["0"]).eval()
    x = torch.randn(2, 3, 12)
    set_rank(model, rank)
    layer = _only(model)
    assert (layer.in_features, layer.out_features) == (12, 10)
    torch.testing.assert_close(model(x).double(), _dense(layer, x, rank, 6.0), rtol=1e-5, atol=1e-5)


def test_the_update_starts_at_zero(mlp, rows, dylora) -> None:
    expected = mlp(rows)
    model = dylora(mlp, target_modules=["0", "2"], init_weights=True)
    assert torch.equal(model(rows), expected)
    assert all(bool(layer.dylora_down["default"].any()) for _, layer in adapted_layers(model))


@given(rank=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_rows_above_the_rank_do_not_matter(rank, seed) -> None:
    torch.manual_seed(seed)
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5)), DyloraConfig(r=4, target_modules=["0"], init_weights=False)
    ).eval()
    layer, x = _only(model), torch.randn(3, 6)
    set_rank(model, rank)
    before = model(x)
    with torch.no_grad():
        layer.dylora_down["default"][rank:] = float("nan")
        layer.dylora_up["default"][:, rank:] = float("nan")
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("mode", "trained"), [("frozen", [1]), ("prefix", [0, 1])])
def test_gradients_reach_what_the_step_trains_and_are_zero_elsewhere(mlp, rows, dylora, mode, trained) -> None:
    model = dylora(mlp, target_modules=["0"], train_mode=mode).train()
    layer = _only(model)
    layer.begin_step("default", 2)
    model(rows).square().sum().backward()
    down, up = layer.dylora_down["default"].grad, layer.dylora_up["default"].grad
    assert [i for i in range(4) if bool(down[i].any())] == trained
    assert [i for i in range(4) if bool(up[:, i].any())] == trained


def _stepping(dylora, mode: str) -> tuple[DyloraLinear, list[torch.Tensor], torch.Tensor]:
    """A float64 layer in a step of rank 3 of 4, its A and B, and an input."""
    torch.manual_seed(0)
    model = dylora(nn.Sequential(nn.Linear(5, 6)).double(), target_modules=["0"], train_mode=mode).train()
    layer = _only(model)
    layer.begin_step("default", 3)
    factors = [layer.dylora_down["default"], layer.dylora_up["default"]]
    return layer, [f.detach().double().requires_grad_() for f in factors], torch.randn(4, 5, dtype=torch.float64)


def _output(layer: DyloraLinear, down: torch.Tensor, up: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(layer, {"dylora_down.default": down, "dylora_up.default": up}, (x,))


def test_the_gradient_is_that_of_the_output(dylora) -> None:
    layer, factors, x = _stepping(dylora, "prefix")
    assert torch.autograd.gradcheck(lambda down, up: _output(layer, down, up, x), factors)


@pytest.mark.parametrize(("mode", "first"), [("frozen", 2), ("prefix", 0)])
def test_gradients_are_those_of_the_formula_where_the_step_trains(dylora, mode, first) -> None:
    layer, (down, up), x = _stepping(dylora, mode)
    _output(layer, down, up, x).square().sum().backward()
    a, b = (factor.detach().clone().requires_grad_() for factor in (down, up))
    (layer.base_layer(x).detach() + 2.0 * (x @ a[:3].T) @ b[:, :3].T).square().sum().backward()
    for found, expected in ((down.grad, a.grad), (up.grad.T, b.grad.T)):
        kept = torch.zeros_like(expected)
        kept[first:3] = expected[first:3]
        torch.testing.assert_close(found, kept, rtol=1e-10, atol=1e-12)


def test_evaluation_never_uses_the_rank_of_a_step(mlp, rows, dylora) -> None:
    model = dylora(mlp, target_modules=["0"]).eval()
    set_rank(model, 3)
    expected = model(rows)
    layer = _only(model)
    layer.begin_step("default", 1)
    assert torch.equal(model(rows), expected)
    assert not torch.equal(model.train()(rows), expected)
    layer.end_step("default")
    assert torch.equal(model(rows), expected)


@pytest.mark.parametrize("mode", ["frozen", "prefix"])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_step_leaves_what_it_does_not_train_bit_for_bit(mlp, rows, dylora, mode, rank) -> None:
    model = dylora(mlp, target_modules=["0"], train_mode=mode).train()
    layer = _only(model)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for earlier in (4, 2):
        layer.begin_step("default", earlier)
        model(rows).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.end_step("default")
    down, up = (container["default"].detach().clone() for container in (layer.dylora_down, layer.dylora_up))
    layer.begin_step("default", rank)
    model(rows).square().sum().backward()
    optimizer.step()
    trained = range(rank - 1 if mode == "frozen" else 0, rank)
    others = [index for index in range(4) if index not in trained]
    moved = [i for i in others if not torch.equal(layer.dylora_down["default"][i], down[i])]
    assert moved == others, "momentum and decay move rows whose gradient is zero: without this the test proves nothing"
    layer.end_step("default")
    for index in range(4):
        is_same = torch.equal(layer.dylora_down["default"][index], down[index])
        assert is_same == (index in others)
        assert torch.equal(layer.dylora_up["default"][:, index], up[:, index]) == (index in others)


def test_without_strict_rows_move_as_the_optimizer_likes(mlp, rows, dylora) -> None:
    model = dylora(mlp, target_modules=["0"], strict=False).train()
    layer = _only(model)
    before = layer.dylora_down["default"].detach().clone()
    layer.begin_step("default", 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    model(rows).square().sum().backward()
    optimizer.step()
    layer.end_step("default")
    assert layer.before_step == {}
    assert not torch.equal(layer.dylora_down["default"][3], before[3])


@pytest.mark.parametrize("rank", [1, 3, 4, None])
def test_factors_are_exact_lora(mlp, rows, dylora, rank) -> None:
    plain = copy.deepcopy(mlp)
    model = dylora(mlp, target_modules=["0"]).eval()
    set_rank(model, 2 if rank is None else rank)
    layer = _only(model)
    down, up, scaling = layer.lora_factors("default", rank)
    b = 2 if rank is None else rank
    assert (down.shape, up.shape, scaling) == ((b, 12), (10, b), 6.0 / b)
    torch.testing.assert_close(scaling * up @ down, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    lora = get_peft_model(plain, LoraConfig(r=b, lora_alpha=6, target_modules=["0"])).eval()
    with torch.no_grad():
        lora.base_model.model[0].lora_A["default"].weight.copy_(down)
        lora.base_model.model[0].lora_B["default"].weight.copy_(up)
    torch.testing.assert_close(lora(rows), model(rows), rtol=1e-6, atol=1e-7)
    assert down.data_ptr() != layer.dylora_down["default"].data_ptr()


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_factors_of_a_rank_that_does_not_exist_are_refused(mlp, dylora, rank) -> None:
    layer = _only(dylora(mlp, target_modules=["0"]))
    with pytest.raises(
        ValueError, match=rf"rank must be an integer in \[1, 4\], the largest rank of adapter 'default', got {rank}"
    ):
        layer.lora_factors("default", rank)


def test_a_rank_above_the_matrix_is_refused(mlp) -> None:
    with pytest.raises(
        ValueError, match=r"`r`=7 exceeds the rank that '2' can have: its weight is \[6, 10\], so r <= 6"
    ):
        get_peft_model(mlp, DyloraConfig(r=7, target_modules=["2"]))
    with pytest.raises(TypeError, match=r"target module '1' is a Tanh, which cannot be adapted: supported are"):
        get_peft_model(mlp, DyloraConfig(r=2, target_modules=["1"]))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("rank", [1, 3])
def test_merging_is_that_of_the_evaluation_rank_and_unmerging_restores_every_bit(
    mlp, rows, dylora, rank, training
) -> None:
    model = dylora(mlp, target_modules=["0", "2"], dropout=0.5).eval()
    set_rank(model, rank)
    expected = model(rows)
    before = [layer.get_base_layer().weight.detach().clone() for _, layer in adapted_layers(model)]
    for _, layer in adapted_layers(model):
        layer.begin_step("default", 4)
    model.train(training)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(rows), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=rf"merged into 'base_model.model.0' at rank {rank}: unmerge it"):
        set_rank(model, 4)
    set_rank(model, rank)
    model.unmerge_adapter()
    set_rank(model, 4)
    after = [layer.get_base_layer().weight for _, layer in adapted_layers(model)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_training_pass_without_a_schedule_warns_once(mlp, rows, dylora) -> None:
    model = dylora(mlp, target_modules=["0"]).train()
    for _ in range(99):
        model(rows)
    with pytest.warns(RankbitsWarning, match="DyLoRA trains as plain LoRA of rank 4.*DyloraSchedule"):
        model(rows)
    model(rows)
    layer = _only(model)
    layer.begin_step("default", 2)
    model(rows)
    assert layer.unscheduled_passes["default"] == 101
