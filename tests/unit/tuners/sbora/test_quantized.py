"""QSBoRA: adapters on bases in 4 and 8 bits, which bitsandbytes and torchao store; learning, merging, and back."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from rankbits import SboraConfig
from rankbits.errors import RankbitsWarning
from rankbits.tuners.sbora import SboraLinear, sbora_layers

VARIANTS = ["fa", "fb"]
SIZE = 64
"""bitsandbytes evaluates 4-bit layers on some CPUs in blocks of 32 outputs, and quantizes 64 weights together."""
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def _four_bits(**settings: Any) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(SIZE, SIZE, quant_type="nf4", **{"compute_dtype": torch.float32} | settings)
    return layer.to("cpu")


def _eight_bits() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    return bnb.nn.Linear8bitLt(SIZE, SIZE, has_fp16_weights=False).to("cpu")


BASES: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: _four_bits(compress_statistics=False),
    "nf4 with double quantization": lambda: _four_bits(compress_statistics=True),
    "nf4 stored as bfloat16": lambda: _four_bits(quant_storage=torch.bfloat16),
    "int8": _eight_bits,
}


def _adapted(base: nn.Module, variant: str, **settings: Any) -> SboraLinear:
    config = SboraConfig(**{"r": 8, "variant": variant, "init_weights": False, "disjoint": True} | settings)
    return SboraLinear(base, "a", config, "layer", {})


def _codes(layer: SboraLinear) -> torch.Tensor:
    return layer.get_base_layer().weight.detach().clone()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_the_update_is_added_to_what_the_base_computes(variant, make) -> None:
    x = torch.randn(3, 5, SIZE)
    plain = make()
    expected = plain.train()(x)
    layer = _adapted(make(), variant).train()
    update = x @ layer.get_delta_weight("a").T
    torch.testing.assert_close(layer(x), expected + update, rtol=1e-5, atol=1e-5)
    zero = _adapted(make(), variant, init_weights=True).train()
    assert torch.equal(zero(x), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_only_the_adapter_learns_and_gradients_reach_the_input(variant, make) -> None:
    layer = _adapted(make(), variant).train()
    layer.get_base_layer().requires_grad_(False)
    x = torch.randn(4, SIZE, requires_grad=True)
    seed = torch.randn(4, SIZE)
    layer(x).backward(seed)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert [p.dtype for p in trained] == [torch.float32]
    full = seed.T @ x.detach() * layer.scaling["a"]
    indices = layer.indices_of("a")
    torch.testing.assert_close(trained[0].grad, full[:, indices] if variant == "fa" else full[indices])
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert bool(x.grad.any())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
@pytest.mark.parametrize("evaluated_first", [False, True], ids=["fresh", "evaluated first"])
def test_merging_is_close_and_unmerging_restores_every_code(variant, make, evaluated_first) -> None:
    layer = _adapted(make(), variant).eval()
    x = torch.randn(3, SIZE)
    if evaluated_first:
        with torch.no_grad():
            layer(x)
    weight = layer.get_base_weight().clone()
    before = _codes(layer)
    layer.train()
    expected = layer(x)
    with pytest.warns(RankbitsWarning, match="merged into a quantized base, which rounds the sum to its grid again"):
        layer.merge(safe_merge=True)
    merged = layer.get_base_weight()
    wanted = layer.merged_weight("a", weight.float())
    lost = (merged.float() - wanted).norm() / wanted.norm()
    assert lost < 0.12
    assert (layer(x) - expected).norm() / expected.norm() < 0.15
    layer.unmerge()
    assert torch.equal(_codes(layer).view(torch.uint8), before.view(torch.uint8))
    assert torch.equal(layer.get_base_weight(), weight)
    assert torch.equal(layer(x), expected)
    # A weight that its package takes for one not yet quantized would be quantized a second time by a move.
    layer.to("cpu")
    assert torch.equal(_codes(layer).view(torch.uint8), before.view(torch.uint8))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_tasks_come_out_in_any_order_and_no_rounding_adds_up(variant, make) -> None:
    layer = _adapted(make(), variant)
    for name in ("b", "c"):
        layer.update_layer(name, SboraConfig(r=4, variant=variant, init_weights=False, disjoint=True), "layer")
    before, weight = _codes(layer), layer.get_base_weight().clone()
    layer.merge(adapter_names=["b"])
    alone = layer.get_base_weight().clone()
    layer.unmerge()
    layer.merge(adapter_names=["a"])
    layer.merge(adapter_names=["b", "c"])
    layer.unmerge(["a"])
    layer.unmerge(["c"])
    assert layer.merged_adapters == ["b"]
    assert torch.equal(layer.get_base_weight(), alone)
    layer.unmerge(["b"])
    assert torch.equal(_codes(layer).view(torch.uint8), before.view(torch.uint8))
    assert torch.equal(layer.get_base_weight(), weight)


def test_a_4_bit_layer_has_one_quantization_state_after_unmerging() -> None:
    """The layer keeps the state beside its weight, for when the weight loses it."""
    layer = _adapted(_four_bits(), "fa")
    base = layer.get_base_layer()
    state = base.weight.quant_state
    base.quant_state = state
    layer.merge()
    assert base.weight.quant_state is not state
    layer.unmerge()
    assert base.weight.quant_state is state
    assert base.quant_state is state


def test_a_merged_4_bit_layer_may_be_evaluated_on_any_cpu() -> None:
    """4-bit weights are rearranged in place by bitsandbytes when they are first evaluated on CPUs with AVX512-BF16."""
    layer = _adapted(_four_bits(), "fa").eval()
    x = torch.randn(3, SIZE)
    with torch.no_grad():
        first = layer(x)
        layer.merge()
        merged = layer(x)
        layer.unmerge()
        again = layer(x)
    assert (merged - first).norm() / first.norm() < 0.15
    torch.testing.assert_close(again, first, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_without_loss_into_the_dequantized_weight(variant) -> None:
    quantized = _adapted(_four_bits(), variant).train()
    plain = nn.Linear(SIZE, SIZE)
    plain.weight.data.copy_(quantized.get_base_weight())
    plain.bias.data.copy_(quantized.get_base_layer().bias)
    dense = _adapted(plain, variant)
    dense.load_state_dict({k: v for k, v in quantized.state_dict().items() if "base_layer" not in k}, strict=False)
    x = torch.randn(3, SIZE)
    expected = quantized(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RankbitsWarning)
        dense.merge()
    torch.testing.assert_close(dense(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_torchao_base_is_merged_and_restored(variant) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    base = nn.Linear(SIZE, SIZE)
    quantize_(base, Int8WeightOnlyConfig(version=2))
    config = SboraConfig(r=8, variant=variant, init_weights=False)
    layer = SboraLinear(base, "a", config, "layer", {"get_apply_tensor_subclass": Int8WeightOnlyConfig})
    x = torch.randn(3, SIZE)
    expected, weight, kept = layer(x), layer.get_base_weight().clone(), base.weight
    layer.merge()
    assert (layer(x) - expected).norm() / expected.norm() < 0.02
    assert base.weight is not kept
    layer.unmerge()
    assert base.weight is kept
    assert torch.equal(layer.get_base_weight(), weight)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_base_that_cannot_be_merged_says_so_and_is_as_it_was(variant) -> None:
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    layer = _adapted(nn.Linear(SIZE, SIZE), variant)
    quantized = _adapted(_four_bits(), variant)
    quantized.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    with pytest.raises(TypeError, match="not supported for gptq layers"):
        quantized.merge()
    assert quantized.merged_adapters == []
    assert quantized.get_delta_weight("a").shape == (SIZE, SIZE)
    assert torch.equal(quantized.get_delta_weight("a").bool(), layer.get_delta_weight("a").bool())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_model_in_4_bits_learns(variant) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(_four_bits(), nn.Tanh(), _four_bits())
    model = get_peft_model(base, SboraConfig(r=8, variant=variant, target_modules=["0", "2"])).train()
    assert len(list(sbora_layers(model))) == 2
    x, y = torch.randn(16, SIZE), torch.randn(16, SIZE)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
