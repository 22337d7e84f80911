"""A MoRA layer computes h = W0 x + bias + f_decomp(M f_comp(x)): at the start, in training and merged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from rankbits import MoraConfig
from rankbits.tuners.mora import MoraLinear, MoraType

IN, OUT = 30, 22
SHAPES = [(IN, OUT), (OUT, IN), (24, 24), (23, 23)]
BLOCKWISE = ("rotation", "decoupling")
kinds = pytest.mark.parametrize("kind", [kind.value for kind in MoraType])


def _adapted(base: nn.Module, **settings):
    """A model of one adapted layer, called "0", and the layer."""
    chosen = {"r": 2, "init_weights": False, "target_modules": ["0"]} | settings
    model = get_peft_model(nn.Sequential(base), MoraConfig(**chosen))
    return model, model.base_model.model[0]


def _close(found, expected, dtype) -> None:
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-8}[dtype]
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * scale)


@kinds
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("transposed", "bias"), [(False, False), (False, True), (True, True)])
def test_a_layer_is_the_papers_formula(dense_update, kind, shape, transposed, bias) -> None:
    base = Conv1D(shape[1], shape[0]) if transposed else nn.Linear(*shape, bias=bias)
    if bias:
        nn.init.normal_(base.bias)
    model, layer = _adapted(base.double(), mora_type=kind)
    weight = (base.weight.T if transposed else base.weight).detach()
    update = dense_update(kind, layer.mora_M["default"], shape[1], shape[0])
    x = torch.randn(2, 3, shape[0], dtype=torch.float64)
    expected = x @ (weight + update).T + (base.bias if bias else 0)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert float((x @ update.T).abs().max()) > 0.1
    delta = layer.get_delta_weight("default")
    assert delta.shape == base.weight.shape
    torch.testing.assert_close(delta, update.T if transposed else update, rtol=1e-6, atol=1e-6)


@kinds
def test_the_start_is_the_base_model_exactly(kind) -> None:
    base, x = nn.Linear(IN, OUT), torch.randn(4, IN)
    expected = base(x)
    model, layer = _adapted(base, mora_type=kind, init_weights=True, dropout=0.5)
    assert not layer.mora_M["default"].any()
    assert torch.equal(model.train()(x), expected)
    assert torch.equal(model.eval()(x), expected)
    model.merge_adapter()
    assert torch.equal(model(x), expected)


def test_another_start_is_drawn_as_a_linear_layer_is() -> None:
    _, layer = _adapted(nn.Linear(400, 400), r=20)
    matrix = layer.mora_M["default"].detach()
    bound = len(matrix) ** -0.5
    assert float(matrix.abs().max()) <= bound
    assert float(matrix.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


@kinds
def test_the_matrix_learns_from_the_start(kind) -> None:
    model, layer = _adapted(nn.Linear(IN, OUT), mora_type=kind, init_weights=True)
    model.train()(torch.randn(8, IN)).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"base_model.model.0.mora_M.default"}
    grad = layer.mora_M["default"].grad
    assert bool((grad != 0).any(dim=0).all())
    assert bool((grad != 0).any(dim=1).all())
    assert layer.base_layer.weight.grad is None


@kinds
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merging_changes_nothing_and_is_undone(kind, shape, transposed, dtype) -> None:
    base = (Conv1D(shape[1], shape[0]) if transposed else nn.Linear(*shape)).to(dtype)
    before, x = base.weight.detach().clone(), torch.randn(5, shape[0], dtype=dtype)
    model, layer = _adapted(base, mora_type=kind, dropout=0.5)
    model.eval()
    expected, delta = model(x).detach(), layer.get_delta_weight("default")
    model.merge_adapter(safe_merge=True)
    assert layer.merged
    _close(model(x).detach(), expected, dtype)
    _close(base.weight.detach(), before.double() + delta.double(), dtype)
    _close(model.train()(x).detach(), expected, dtype)
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)
    _close(model.eval()(x).detach(), expected, dtype)
    merged = model.merge_and_unload()
    assert merged[0] is base
    _close(merged(x).detach(), expected, dtype)


@pytest.mark.parametrize("kind", BLOCKWISE)
def test_folding_reads_every_input(dense_update, kind) -> None:
    model, layer = _adapted(nn.Linear(172, 64).double(), mora_type=kind, fold=True)
    update = dense_update(kind, layer.mora_M["default"], 64, 172, fold=True)
    torch.testing.assert_close(layer.get_delta_weight("default"), update, rtol=1e-6, atol=1e-6)
    x = torch.randn(3, 172, dtype=torch.float64)
    torch.testing.assert_close(model(x) - layer.base_layer(x), x @ update.T, rtol=1e-6, atol=1e-6)


@kinds
@pytest.mark.parametrize("transposed", [False, True])
def test_a_lora_pair_multiplies_to_the_delta_or_is_refused(kind, transposed) -> None:
    _, layer = _adapted(Conv1D(OUT, IN) if transposed else nn.Linear(IN, OUT), mora_type=kind)
    assert layer.supports_lora_conversion() == (kind not in BLOCKWISE)
    if kind in BLOCKWISE:
        with pytest.raises(ValueError, match=rf"{kind}.*reach rank {OUT}.*a \[{OUT}, {IN}\] weight; merge it, or"):
            layer.lora_factors("default")
        return
    down, up = layer.lora_factors("default")
    side = layer.forms["default"].side
    assert (down.shape, up.shape) == ((side, IN), (OUT, side))
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(up @ down, delta.T if transposed else delta, rtol=1e-6, atol=1e-6)


def test_the_pair_runs_as_pefts_own_lora() -> None:
    from peft import LoraConfig

    base = nn.Linear(IN, OUT)
    model, layer = _adapted(copy.deepcopy(base), mora_type="sharing")
    down, up = layer.lora_factors("default")
    plain = get_peft_model(
        nn.Sequential(base), LoraConfig(r=len(down), lora_alpha=len(down), target_modules=["0"])
    ).eval()
    with torch.no_grad():
        plain.base_model.model[0].lora_A["default"].weight.copy_(down)
        plain.base_model.model[0].lora_B["default"].weight.copy_(up)
    x = torch.randn(4, IN)
    torch.testing.assert_close(plain(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_dropout_acts_on_each_adapters_input_alone() -> None:
    model, layer = _adapted(nn.Linear(IN, OUT).double(), mora_type="sharing", dropout=0.5)
    model.add_adapter("other", MoraConfig(r=1, mora_type="truncation", init_weights=False, target_modules=["0"]))
    layer.set_adapter(["default", "other"])
    x = torch.randn(6, IN, dtype=torch.float64)
    first, second = layer.get_delta_weight("default"), layer.get_delta_weight("other")
    layer.train()
    torch.manual_seed(1)
    dropped = F.dropout(x.float(), 0.5).double()
    torch.manual_seed(1)
    expected = layer.base_layer(x) + dropped @ first.T + x @ second.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    expected = layer.base_layer(x) + x @ first.T + x @ second.T
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-5, atol=1e-5)


def test_several_adapters_merge_together_and_one_by_one() -> None:
    model, layer = _adapted(nn.Linear(IN, OUT), mora_type="rotation")
    model.add_adapter("other", MoraConfig(r=1, mora_type=2, init_weights=False, target_modules=["0"]))
    before, x = layer.base_layer.weight.detach().clone(), torch.randn(4, IN)
    first, second = layer.get_delta_weight("default"), layer.get_delta_weight("other")
    model.eval()
    layer.set_adapter(["default", "other"])
    both = model(x).detach()
    model.merge_adapter(["default", "other"])
    assert layer.merged_adapters == ["default", "other"]
    torch.testing.assert_close(layer.base_layer.weight, before + first + second)
    _close(model(x).detach(), both, torch.float32)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    model.merge_adapter(["other"])
    torch.testing.assert_close(layer.base_layer.weight, before + second)
    model.unmerge_adapter()
    model.delete_adapter("other")
    assert list(layer.mora_M) == list(layer.mora_dropout) == list(layer.r) == list(layer.forms) == ["default"]
    model.set_adapter("default")
    _close(model(x).detach(), x @ (before + first).T + layer.base_layer.bias.detach(), torch.float32)


def test_disabling_and_unloading_give_the_base_back() -> None:
    base, x = nn.Linear(IN, OUT), torch.randn(4, IN)
    expected = base(x)
    model, _ = _adapted(base)
    assert not torch.allclose(model(x), expected, atol=1e-2)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    plain = model.unload()
    assert plain[0] is base
    assert torch.equal(plain(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@kinds
def test_the_output_has_the_dtype_of_the_input(kind, dtype, autocast_adapter_dtype) -> None:
    config = MoraConfig(r=2, mora_type=kind, target_modules=["0"], init_weights=False)
    model = get_peft_model(
        nn.Sequential(nn.Linear(IN, OUT)).to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype
    )
    layer, x = model.base_model.model[0], torch.randn(3, IN, dtype=dtype)
    lifted = autocast_adapter_dtype and dtype in {torch.bfloat16, torch.float16}
    assert layer.mora_M["default"].dtype == (torch.float32 if lifted else dtype)
    found = model(x)
    assert found.dtype == dtype
    expected = layer.base_layer(x).double() + x.double() @ layer.get_delta_weight("default").double().T
    _close(found.detach(), expected.detach(), dtype)
    # The cast makes another parameter, which is the one that has to learn.
    found.float().sum().backward()
    assert bool((layer.mora_M["default"].grad != 0).any())


@kinds
def test_autocast_runs_the_product_in_half_precision(kind) -> None:
    model, layer = _adapted(nn.Linear(IN, OUT), mora_type=kind)
    x = torch.randn(3, IN)
    full = model(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
        inner = layer.adapted_forward(x)
    assert inner.dtype == torch.bfloat16
    assert half.dtype == torch.float32
    _close(half.detach(), full, torch.bfloat16)
    half.sum().backward()
    assert layer.mora_M["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
@kinds
def test_gradient_checkpointing_changes_no_gradient(kind, use_reentrant) -> None:
    _, layer = _adapted(nn.Linear(IN, OUT), mora_type=kind, dropout=0.3)
    layer.train()
    found = []
    for recompute in (False, True):
        x = torch.randn(5, IN, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layer.zero_grad()
        torch.manual_seed(2)
        y = checkpoint(layer, x, use_reentrant=use_reentrant) if recompute else layer(x)
        y.square().sum().backward()
        found.append((x.grad, layer.mora_M["default"].grad.clone()))
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((20, 2), {"r": 1}, r"`r`=1 gives MoRA's matrix side 4 in '0'.*\[2, 20\].*at most 2, so no r fits: leave"),
        ((30, 22), {"r": 11}, r"`r`=11 gives MoRA's matrix side 24 in '0'.*\[22, 30\].*at most 22, so r <= 10"),
        ((30, 22), {"r": 10, "mora_type": 1}, r"`r`=10 gives MoRA's matrix side 23 .*at most 22, so r <= 9"),
        ((1, 1), {"r": 1}, r"side 0 in '0'.*no r fits"),
    ],
)
def test_a_rank_beyond_the_layer_is_refused_with_what_fits(shape, settings, message) -> None:
    model = nn.Sequential(nn.Linear(*shape))
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MoraConfig(target_modules=["0"], **settings))


@pytest.mark.parametrize(("kind", "most"), [("rotation", 10), ("sharing", 9)])
def test_the_largest_rank_that_is_named_works(kind, most) -> None:
    model, layer = _adapted(nn.Linear(30, 22), r=most, mora_type=kind)
    assert layer.forms["default"].side == 22
    assert bool(torch.isfinite(model(torch.randn(2, 30))).all())


def test_a_refused_second_adapter_leaves_the_first_alone() -> None:
    model, layer = _adapted(nn.Linear(30, 22))
    with pytest.raises(ValueError, match="`r`=50"):
        layer.update_layer("other", MoraConfig(r=50, target_modules=["0"]), "0")
    assert list(layer.mora_M) == list(layer.forms) == list(layer.r) == ["default"]
    assert bool(torch.isfinite(model(torch.randn(2, 30))).all())


def test_floor_never_has_more_parameters_than_lora() -> None:
    sides = {}
    for rounding in ("nearest", "floor"):
        _, layer = _adapted(nn.Linear(768, 768), r=8, mora_type="sharing", rounding=rounding)
        sides[rounding] = layer.mora_M["default"].numel()
    assert sides == {"nearest": 12_321, "floor": 12_100}


def test_other_layers_are_refused() -> None:
    with pytest.raises(TypeError, match="target module '0' is a Embedding, which cannot be adapted: supported are"):
        get_peft_model(nn.Sequential(nn.Embedding(30, 30)), MoraConfig(r=1, target_modules=["0"]))


def test_a_layer_says_what_it_is() -> None:
    _, layer = _adapted(nn.Linear(IN, OUT))
    assert isinstance(layer, MoraLinear)
    assert repr(layer).startswith("mora.MoraLinear(")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("order", [1, -1])
def test_compiled_code_of_one_type_is_not_run_for_another(order) -> None:
    torch.compiler.reset()
    x = torch.randn(3, IN)
    for kind in list(MoraType)[::order]:
        _, layer = _adapted(nn.Linear(IN, OUT), mora_type=kind.value)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@kinds
def test_compiled_without_a_graph_break(kind) -> None:
    torch.compiler.reset()
    _, layer = _adapted(nn.Linear(IN, OUT), mora_type=kind)
    x = torch.randn(3, IN)
    layer(x).square().sum().backward()
    eager = layer.mora_M["default"].grad.clone()
    layer.zero_grad()
    torch.compile(layer, fullgraph=True)(x).square().sum().backward()
    torch.testing.assert_close(layer.mora_M["default"].grad, eager, rtol=1e-4, atol=1e-4)
