"""One layer computes the formula, refuses to merge, and leaves nothing behind in other modules."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankbits import BottleneckConfig
from rankbits.errors import MergeError, ModelError
from rankbits.tuners.bottleneck import BottleneckLinear

FUNCTIONS = {
    "relu": lambda h: h.clamp(min=0),
    "swish": lambda h: h / (1 + torch.exp(-h)),
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2))),
    "tanh": lambda h: (torch.exp(h) - torch.exp(-h)) / (torch.exp(h) + torch.exp(-h)),
}


def _attach(model: nn.Module, **chosen) -> tuple[nn.Module, BottleneckLinear]:
    given_ = {"target_modules": ["0"], "bottleneck_size": 3, "init_weights": False} | chosen
    adapted = get_peft_model(model, BottleneckConfig(**given_)).eval()
    return adapted, next(module for module in adapted.modules() if isinstance(module, BottleneckLinear))


def _dense(layer: BottleneckLinear, x: torch.Tensor, function: str, scaling: float) -> torch.Tensor:
    """The formula in float64 with explicit sums."""
    weight, bias = layer.oriented(layer.get_base_layer().weight).double(), layer.bias.double()
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    h = torch.einsum("...i,oi->...o", x.double(), weight) + bias
    z = x.double() if layer.kind["default"] == "parallel" else h
    hidden = torch.einsum("...i,mi->...m", z, down.weight.double())
    hidden = FUNCTIONS[function](hidden if down.bias is None else hidden + down.bias.double())
    added = torch.einsum("...m,om->...o", hidden, up.weight.double())
    return h + scaling * (added if up.bias is None else added + up.bias.double())


@given(
    kind=st.sampled_from(["houlsby", "parallel"]),
    function=st.sampled_from(sorted(FUNCTIONS)),
    scaling=st.floats(0.1, 4.0),
    use_biases=st.booleans(),
    base=st.sampled_from(["linear", "conv1d"]),
)
@settings(max_examples=40, deadline=None)
def test_the_output_is_the_formula(kind, function, scaling, use_biases, base) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5) if base == "linear" else Conv1D(5, 6))
    chosen = {"kind": kind, "non_linearity": function, "scaling": scaling, "use_biases": use_biases}
    adapted, layer = _attach(model, **chosen)
    with torch.no_grad():
        for p in layer.bottleneck_down.parameters():
            p.normal_()
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(adapted(x).double(), _dense(layer, x, function, scaling), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["houlsby", "parallel"])
def test_the_gradient_is_that_of_the_output(kind) -> None:
    torch.manual_seed(0)
    model, _ = _attach(nn.Sequential(nn.Linear(5, 4)).double(), kind=kind, non_linearity="tanh")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 4
    values = [model.get_parameter(name).detach().double().requires_grad_() for name in names]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def output(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *values))


@pytest.mark.parametrize(
    ("init_weights", "down_std", "up_std"), [("zero", 0.02, 0.0), ("normal", 0.02, 0.02), (False, 0.0361, 0.0722)]
)
def test_starts(init_weights, down_std, up_std) -> None:
    torch.manual_seed(0)
    # Kaiming-uniform with a = sqrt(5) is uniform on +-1/sqrt(fan_in), of standard deviation 1/sqrt(3 fan_in).
    model = nn.Sequential(nn.Linear(64, 256))
    _, layer = _attach(model, bottleneck_size=64, init_weights=init_weights)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    assert not bool(down.bias.any() or up.bias.any())
    assert float(down.weight.detach().std()) == pytest.approx(down_std, rel=0.05)
    assert float(up.weight.detach().std()) == pytest.approx(up_std, rel=0.05)


def test_a_parallel_adapter_starts_with_kaiming_uniform_and_zero() -> None:
    _, layer = _attach(nn.Sequential(nn.Linear(64, 256)), kind="parallel", bottleneck_size=64, init_weights=True)
    assert not bool(layer.bottleneck_up["default"].weight.any())
    assert float(layer.bottleneck_down["default"].weight.detach().abs().max()) == pytest.approx(1 / 8, rel=0.01)


def test_dropout_stands_behind_the_non_linearity_and_only_in_training() -> None:
    torch.manual_seed(0)
    model, layer = _attach(nn.Sequential(nn.Linear(6, 5)), dropout=0.5, non_linearity="tanh")
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x).double(), _dense(layer, x, "tanh", 1.0), rtol=1e-5, atol=1e-5)
    model.train()
    torch.manual_seed(1)
    found = model(x)
    torch.manual_seed(1)
    h = layer.base_layer(x)
    hidden = torch.dropout(torch.tanh(layer.bottleneck_down["default"](h)), 0.5, True)
    torch.testing.assert_close(found, h + layer.bottleneck_up["default"](hidden))


def test_merging_is_refused_with_the_reason_and_unloading_works(mlp, rows) -> None:
    base, expected = [mlp[0], mlp[2]], mlp(rows)
    before = [layer.weight.detach().clone() for layer in base]
    model, layer = _attach(mlp, target_modules=["0", "2"])
    adapted = model(rows)
    refusal = "adapter 'default' cannot be merged: a bottleneck adapter applies swish between its two matrices"
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge, lambda: layer.get_delta_weight("default")):
        with pytest.raises(MergeError, match=refusal):
            merge()
    assert not layer.merged
    assert not layer.supports_lora_conversion("default")
    assert torch.equal(model(rows), adapted)
    plain = model.unload()
    assert [plain[0], plain[2]] == base
    assert torch.equal(plain(rows), expected)
    assert all(torch.equal(a, layer.weight) for a, layer in zip(before, base, strict=True))


def test_layers_of_other_types_are_refused() -> None:
    for other in (nn.Embedding(4, 4), nn.LayerNorm(4)):
        with pytest.raises(TypeError, match=rf"'0' is a {type(other).__name__}, which cannot be adapted: supported"):
            get_peft_model(nn.Sequential(other), BottleneckConfig(target_modules=["0"]))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.widen, self.narrow = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(torch.relu(self.widen(self.norm(input=x))))


PATHS = {"output": "narrow", "input": "widen", "norm_before": "norm"}


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("kind", ["pfeiffer", "parallel"])
def test_what_an_adapter_hears_is_forgotten_after_each_pass(kind) -> None:
    model, layer = _attach(_Block(), kind=kind, target_modules=None, feed_forward=PATHS, non_linearity="tanh")
    x = torch.randn(2, 6)
    adapted = model(x)
    with model.disable_adapter():
        plain = model(x)
    assert not torch.allclose(adapted, plain)
    assert layer.ears["default"].heard is None
    with pytest.raises(ModelError, match="the module of its block whose input it reads did not run before it"):
        layer(torch.randn(2, 9))


@pytest.mark.parametrize("kind", ["pfeiffer", "parallel"])
def test_hooks_go_with_their_adapters(kind) -> None:
    model, _ = _attach(_Block(), kind=kind, target_modules=None, feed_forward=PATHS)
    model.add_adapter("other", BottleneckConfig(kind="parallel", feed_forward=PATHS))
    assert _hooks(model) == 2
    model.delete_adapter("other")
    assert _hooks(model) == 1
    plain = model.unload()
    assert _hooks(plain) == 0


@pytest.mark.parametrize("kind", ["pfeiffer", "parallel"])
def test_copies_and_pickles_hear_their_own_blocks(kind) -> None:
    model, layer = _attach(_Block(), kind=kind, target_modules=None, feed_forward=PATHS)
    x = torch.randn(2, 6)
    expected = model(x)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = next(module for module in clone.modules() if isinstance(module, BottleneckLinear))
        assert own.ears["default"] is not layer.ears["default"]
        assert torch.equal(clone(x), expected)
        with torch.no_grad():
            clone.get_base_model().norm.weight.mul_(3.0)
        assert not torch.allclose(clone(x), expected)
    assert torch.equal(model(x), expected)


def test_replicas_of_data_parallel_are_refused() -> None:
    model, layer = _attach(_Block(), kind="parallel", target_modules=None, feed_forward=PATHS)
    layer._is_replica = True
    with pytest.raises(ModelError, match=r"replicas of torch\.nn\.DataParallel cannot see"):
        model(torch.randn(2, 6))


def test_adapters_of_different_kinds_stand_beside_each_other() -> None:
    model, layer = _attach(_Block(), kind="parallel", target_modules=None, feed_forward=PATHS, scaling=1.0)
    model.add_adapter("h", BottleneckConfig(target_modules=["narrow"], bottleneck_size=2, init_weights=False))
    assert not [name for name, p in model.named_parameters() if p.requires_grad and ".h." in name]
    x = torch.randn(2, 6)
    with model.disable_adapter():
        plain = model(x)
    first = model(x)
    model.set_adapter("h")
    second = model(x)
    layer.set_adapter(["default", "h"])
    torch.testing.assert_close(model(x) - plain, (first - plain) + (second - plain))
    assert not torch.allclose(first, second)
    with pytest.raises(ValueError, match="BottleneckModel cannot mix adapters"):
        model(x, adapter_names=["h", "default"])
    model.set_adapter("h")
    model.delete_adapter("default")
    assert torch.equal(model(x), second)
    assert all("default" not in getattr(layer, name) for name in layer.other_param_names + layer.adapter_layer_names)
