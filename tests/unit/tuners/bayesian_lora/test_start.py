"""Layers that no quantizer of the weight can stand in for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


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
    with pytest.raises(TypeError, match=r"^target module '3' is a _Normed, which is more than a product"):
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
