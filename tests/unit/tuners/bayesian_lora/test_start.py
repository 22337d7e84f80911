"""Layers that no quantizer of the weight can stand in for."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import FalconConfig, FalconForCausalLM
from transformers.pytorch_utils import Conv1D

from rankbits import BayesianLoraConfig, harden
from rankbits.tuners.bayesian_lora.start import check_quantizable


class _Normed(nn.Linear):
    """A linear layer that does something of its own, such as transformers' layers for weights of three values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.layer_norm(x, x.shape[-1:]), self.weight, self.bias)


class _Named(nn.Linear):
    """A linear layer under another name."""


@pytest.mark.parametrize("placement", ["separate", "merged"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_before_anything_changes(mlp, adapt, placement, value) -> None:
    layer = mlp.get_submodule("2")
    with torch.no_grad():
        layer.weight[1, 2:4] = value
    with pytest.raises(ValueError, match=r"^'2': 2 of its 60 weights are NaN or infinite, .* exclude_modules"):
        adapt(mlp, target_modules=["2"], placement=placement, quantizers=["weight"])
    assert mlp.get_submodule("2") is layer


@pytest.mark.parametrize("placement", ["separate", "merged"])
def test_a_layer_that_does_more_than_multiply_is_refused_before_anything_changes(mlp, adapt, placement) -> None:
    mlp.add_module("3", _Normed(6, 6))
    with pytest.raises(TypeError, match=r"^target module '3' is a .*\._Normed with a forward of its own"):
        adapt(mlp, target_modules=["3"], placement=placement, quantizers=["weight"])
    assert isinstance(mlp.get_submodule("3"), _Normed)


def test_its_product_is_left_to_itself_where_its_weight_has_no_quantizer(mlp, rows, adapt) -> None:
    mlp.add_module("3", _Normed(6, 6))
    expected = mlp(rows)
    assert torch.equal(adapt(mlp, target_modules=["3"], learn_bits=False, init_weights=True)(rows), expected)


def test_a_name_of_its_own_is_no_reason(mlp, adapt) -> None:
    mlp.add_module("3", _Named(6, 6))
    model = adapt(mlp, target_modules=["3"], quantizers=["weight"])
    assert "weight" in model.get_submodule("base_model.model.3").quantizers_of("default")


class _NormedConv1D(Conv1D):
    """The same for layers whose weight lies the other way round."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.layer_norm(x, x.shape[-1:]))


def test_layers_that_lie_the_other_way_round_are_looked_at_too() -> None:
    check_quantizable(Conv1D(4, 3), torch.ones(4, 3), "a")
    layer = _NormedConv1D(4, 3)
    with pytest.raises(TypeError, match=r"^target module 'a' is a .*\._NormedConv1D with a forward of its own"):
        check_quantizable(layer, layer.weight, "a")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_product_that_is_written_another_way_is_one() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    base = FalconForCausalLM(FalconConfig(**sizes)).eval()
    ids = torch.arange(6)[None]
    expected = base(input_ids=ids).logits
    config = BayesianLoraConfig(r=2, task_type="CAUSAL_LM", quantizers=["weight"], placement="merged")
    model = get_peft_model(base, config).eval()
    # At 32 bits, which is where all widths start.
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_a_hardened_adapter_is_not_loaded_onto_such_a_layer(mlp, rows, adapt, learn, tmp_path) -> None:
    model = adapt(mlp, target_modules=["2"], placement="merged", quantizers=["weight"])
    learn(model, rows)
    harden(model).save_pretrained(str(tmp_path))
    other = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), _Normed(10, 6))
    with pytest.raises(TypeError, match=r"^target module '2' is a .*\._Normed with a forward of its own"):
        PeftModel.from_pretrained(other, str(tmp_path))
