"""The layer computes what the paper's one-hot matrices would, without them: values, gradients, dtypes, dropout."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankbits import SboraConfig
from rankbits.tuners.sbora import SboraLinear, sbora_layers

VARIANTS = ["fa", "fb"]


def _conv1d(bias: bool = True) -> Conv1D:
    layer = Conv1D(10, 12)
    nn.init.normal_(layer.bias, std=0.5 if bias else 0.0)
    return layer


BASES = {"linear": lambda: nn.Linear(12, 10), "no bias": lambda: nn.Linear(12, 10, bias=False), "conv1d": _conv1d}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 3, 12), (2, 1, 3, 12), (0, 12)], ids=str)
def test_the_output_is_that_of_the_one_hot_product(pick, dense_update, only, variant, base, shape) -> None:
    model = pick(nn.Sequential(base()).double(), variant=variant, target_modules=["0"])
    x = torch.randn(shape, dtype=torch.float64)
    layer = only(model)
    bias = 0 if layer.bias is None else layer.bias
    expected = x @ (layer.oriented(layer.weight) + dense_update(layer, "default")).T + bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_one_hot_product(pick, dense_update, only, variant) -> None:
    model = pick(nn.Sequential(nn.Linear(12, 10)).double(), variant=variant, target_modules=["0"], alpha=5.0)
    layer = only(model)
    trained = next(p for p in model.parameters() if p.requires_grad)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(4, 10, dtype=torch.float64)
    model(x).backward(seed)
    full = seed.T @ x.detach() * layer.scaling["default"]  # the gradient of W, [out_features, in_features]
    indices = layer.indices_of("default")
    expected = full[:, indices] if variant == "fa" else full[indices]
    torch.testing.assert_close(trained.grad, expected, rtol=1e-12, atol=1e-12)
    weight = layer.weight + dense_update(layer, "default")
    torch.testing.assert_close(x.grad, seed @ weight, rtol=1e-12, atol=1e-12)
    assert layer.weight.grad is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(pick, only, variant) -> None:
    model = pick(nn.Sequential(nn.Linear(5, 4)).double(), r=2, variant=variant, target_modules=["0"])
    layer = only(model)
    container = layer.sbora_up if variant == "fa" else layer.sbora_down
    value = container["default"].detach().clone().requires_grad_()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    place = f"sbora_{'up' if variant == 'fa' else 'down'}.default"
    torch.autograd.gradcheck(lambda x, v: torch.func.functional_call(layer, {place: v}, (x,)), (x, value))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_trains_r_columns_or_rows_as_full_fine_tuning_would(pick, only, variant) -> None:
    """SBoRA is full fine-tuning of r columns or rows, at alpha / r = 1, with plain gradient descent."""
    base = nn.Linear(12, 10).double()
    full = copy.deepcopy(base)
    model = pick(nn.Sequential(base), variant=variant, target_modules=["0"], alpha=3.0, init_weights=True)
    x, y = torch.randn(20, 12, dtype=torch.float64), torch.randn(20, 10, dtype=torch.float64)
    indices = only(model).indices_of("default")
    mask = torch.zeros(10, 12, dtype=torch.float64)
    mask.index_fill_(int(variant == "fa"), torch.tensor(indices), 1.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(5):
        for parameters, net in ((trained, model), ([full.weight], full)):
            gradients = torch.autograd.grad(F.mse_loss(net(x), y), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(0.1 * gradient * (mask if parameter is full.weight else 1.0))
    model.merge_adapter()
    torch.testing.assert_close(only(model).weight, full.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_at_the_start_not_one_bit_of_the_output_differs(pick, mlp, rows, variant, dtype) -> None:
    mlp, rows = mlp.to(dtype), rows.to(dtype)
    expected = mlp(rows)
    model = pick(mlp, variant=variant, target_modules=["0", "2"], init_weights=True, dropout=0.5).train()
    assert torch.equal(model(rows), expected)
    assert model(rows).dtype == dtype


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_trained_is_one_float32_matrix_and_nothing_else(pick, mlp, variant) -> None:
    model = pick(mlp.to(torch.bfloat16), variant=variant, target_modules=["0", "2"])
    trained = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters() if p.requires_grad}
    shapes = {"fa": ("up", (10, 3), (6, 3)), "fb": ("down", (3, 12), (3, 10))}
    which, first, second = shapes[variant]
    assert trained == {
        f"base_model.model.0.sbora_{which}.default": (first, torch.float32),
        f"base_model.model.2.sbora_{which}.default": (second, torch.float32),
    }
    assert {b.dtype for b in model.buffers()} == {torch.int64}
    model.to(torch.float16)
    assert {b.dtype for b in model.buffers()} == {torch.int64}


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients(pick, mlp, rows, variant) -> None:
    model = pick(mlp, variant=variant, target_modules=["0", "2"])
    full = model(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(rows)
        half.square().mean().backward()
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 and bool(torch.isfinite(g).all()) and bool(g.any()) for g in gradients)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_acts_on_the_input_of_the_update_alone_and_only_in_training(pick, only, variant) -> None:
    model = pick(nn.Sequential(nn.Linear(12, 10)).double(), variant=variant, target_modules=["0"], dropout=0.5)
    layer, x = only(model), torch.ones(4000, 12, dtype=torch.float64)
    layer.weight.data.zero_()
    full = model.eval()(x)
    update = full - layer.bias
    noisy = model.train()(x) - layer.bias
    assert not torch.equal(noisy, update)
    # Mean of 4000 rows of sums of at most 12 terms that are 0 or 2 times what they are without dropout.
    bound = 6 * layer.get_delta_weight("default").norm(dim=1) / 4000**0.5
    assert bool(((noisy.mean(0) - update.mean(0)).abs() <= bound + 1e-12).all())
    if variant == "fb":
        others = [i for i in range(10) if i not in layer.indices_of("default")]
        assert not noisy[:, others].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_of_later_adapters_are_untouched_by_dropout_of_earlier_ones(pick, only, variant) -> None:
    model = pick(nn.Sequential(nn.Linear(12, 10)).double(), variant=variant, target_modules=["0"], dropout=0.9)
    model.add_adapter("plain", SboraConfig(r=2, variant=variant, target_modules=["0"], init_weights=False, seed=1))
    model.base_model.set_adapter(["default", "plain"])
    layer, x = only(model), torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        for container in (layer.sbora_up, layer.sbora_down):
            if "default" in container:
                container["default"].zero_()
    alone = x @ (layer.weight + layer.get_delta_weight("plain")).T + layer.bias
    torch.testing.assert_close(model.train()(x), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_example_of_two_of_four(pick, only, variant) -> None:
    """4 inputs, 4 outputs, the first and the fourth chosen (Po et al. 2024): only they change."""
    model = pick(nn.Sequential(nn.Linear(4, 4)).double(), r=2, variant=variant, target_modules=["0"])
    layer = only(model)
    layer.sbora_indices["default"].copy_(torch.tensor([0, 3]))
    before, delta = layer.weight.clone(), layer.get_delta_weight("default")
    model.merge_adapter()
    changed = layer.weight != before
    expected = torch.zeros(4, 4, dtype=torch.bool)
    if variant == "fa":
        expected[:, [0, 3]] = True
    else:
        expected[[0, 3]] = True
    assert torch.equal(changed, expected)
    assert torch.equal(delta != 0, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_lora_factors_are_the_update_exactly(pick, dense_update, only, variant, base) -> None:
    model = pick(nn.Sequential(base()), variant=variant, target_modules=["0"], alpha=6.0)
    layer = only(model)
    down, up = layer.lora_factors("default")
    assert (down.shape, up.shape) == ((3, 12), (10, 3))
    one_hot = down if variant == "fa" else up.T
    assert torch.equal(one_hot @ one_hot.T, torch.eye(3))
    assert torch.equal(one_hot.argmax(1), layer.sbora_indices["default"])
    delta = layer.oriented(layer.get_delta_weight("default"))
    assert torch.equal(layer.scaling["default"] * (up @ down), delta)
    torch.testing.assert_close(delta.double(), dense_update(layer, "default"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_of_peft_with_these_factors_computes_the_same(pick, mlp, rows, variant) -> None:
    plain = copy.deepcopy(mlp)
    model = pick(mlp, variant=variant, target_modules=["0", "2"], alpha=6.0)
    lora = get_peft_model(plain, LoraConfig(r=3, lora_alpha=6.0, target_modules=["0", "2"]))
    for name, layer in sbora_layers(model.base_model.model):
        down, up = layer.lora_factors("default")
        target = lora.base_model.model.get_submodule(name)
        target.lora_A["default"].weight.data.copy_(down)
        target.lora_B["default"].weight.data.copy_(up)
        assert torch.equal(target.get_delta_weight("default"), layer.get_delta_weight("default"))
    torch.testing.assert_close(model(rows), lora(rows), rtol=1e-6, atol=1e-6)


def test_peft_may_convert_it_to_lora(pick, mlp) -> None:
    model = pick(mlp, target_modules=["0"])
    assert model.supports_lora_conversion()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rank_above_the_matrix_is_refused_and_the_model_is_as_it_was(mlp, rows, variant) -> None:
    expected, base = mlp(rows), [mlp[0], mlp[2]]
    size = {"fa": 10, "fb": 6}[variant]
    config = SboraConfig(r=size + 1, variant=variant, target_modules=["0", "2"])
    with pytest.raises(ValueError, match=rf"`r`={size + 1} of 'default' does not fit '2', .*1 <= r <= {size}"):
        get_peft_model(mlp, config)
    assert [mlp[0], mlp[2]] == base
    assert torch.equal(mlp(rows), expected)
    assert all(p.requires_grad for p in mlp.parameters())
    whole = get_peft_model(mlp, SboraConfig(r=size, variant=variant, target_modules=["2"]))
    ((_, layer),) = sbora_layers(whole)
    assert sorted(layer.indices_of("default")) == list(range(size))


def test_other_layers_than_linear_ones_are_refused_and_the_model_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    base = list(model)
    with pytest.raises(TypeError, match="target module '1' is a Conv1d, which cannot be adapted"):
        get_peft_model(model, SboraConfig(r=2, target_modules=["0", "1"]))
    assert list(model) == base


def test_a_batch_of_several_adapters_is_refused(pick, mlp, rows) -> None:
    model = pick(mlp, target_modules=["0"])
    with pytest.raises(ValueError, match="SboraModel cannot mix adapters"):
        model(rows, adapter_names=["default"] * 7)


def test_the_forward_pass_forms_no_matrix_of_the_size_of_the_weight(pick, only) -> None:
    """With 300 inputs and 200 outputs no tensor but the weight itself has 60,000 elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.sizes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and func is not torch.ops.aten.t.default:
                self.sizes.append(result.numel())
            return result

    for variant in VARIANTS:
        model = pick(nn.Sequential(nn.Linear(300, 200)), variant=variant, target_modules=["0"])
        x = torch.randn(2, 300)
        with Largest() as seen:
            model(x).sum().backward()
        assert seen.sizes
        assert max(seen.sizes) <= 3 * 300
        assert isinstance(only(model), SboraLinear)
