"""Magnitude and direction of a change: closed forms, and merged weights of any tuner's layers."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankbits import MoraConfig
from rankbits.errors import ModelError
from rankbits.tuners.weight_change import merged_weights, weight_change


def test_a_longer_row_changes_in_magnitude_alone() -> None:
    before = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    change = weight_change(before, before * torch.tensor([[2.0], [1.0]]))
    assert change.magnitude == 2.5
    assert change.direction == pytest.approx(0.0, abs=1e-15)


def test_a_turned_row_changes_in_direction_alone() -> None:
    angle = 0.3
    after = torch.tensor([[math.cos(angle), math.sin(angle)], [1.0, 0.0]], dtype=torch.float64)
    change = weight_change(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), after)
    assert change.magnitude == pytest.approx(0.0, abs=1e-15)
    assert change.direction == pytest.approx((1 - math.cos(angle)) / 2)


def test_a_row_of_zeros_has_no_direction() -> None:
    before = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    change = weight_change(before, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert change == (0.5, 1.0)
    assert weight_change(torch.zeros(2, 2), torch.ones(2, 2)).direction == 0.0


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"before has the shape \[2, 3\], after has \[3, 2\]"):
        weight_change(torch.zeros(2, 3), torch.zeros(3, 2))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_merged_weights_are_those_of_the_formula_and_leave_the_model_as_it_was(dora, transposed) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(6, 8) if transposed else nn.Linear(8, 6))
    settings = {"use_dora": dora, "fan_in_fan_out": transposed, "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["0"], **settings)).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = merged_weights(model, lambda name: True)
    layer = model.base_model.model[0]
    plain = layer.get_base_layer().weight.detach()
    moved = (plain.T if transposed else plain) + 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    if dora:
        magnitude = layer.lora_magnitude_vector["default"].weight.reshape(-1, 1)
        moved = magnitude * moved / moved.norm(dim=1, keepdim=True)
    assert list(found) == ["0"]
    torch.testing.assert_close(found["0"], moved.detach())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_adapters_and_ours_have_the_same_names(mlp, rows) -> None:
    plain = merged_weights(mlp, lambda name: name == "2")
    assert torch.equal(plain["2"], mlp[2].weight)
    model = get_peft_model(mlp, MoraConfig(r=1, mora_type="sharing", target_modules=["0", "2"], init_weights=False))
    moved = merged_weights(model, lambda name: name == "2")
    assert list(moved) == list(plain)
    assert weight_change(plain["2"], moved["2"]).direction > 0.0
    assert not model.base_model.model[2].merged


def test_parameters_are_measured_like_other_tensors() -> None:
    assert weight_change(nn.Parameter(torch.ones(1, 2)), torch.ones(1, 2)).magnitude == 0.0


def test_weights_held_as_codes_are_refused() -> None:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"layer 0 holds its weight as codes \(torch.int8\), expected floating point"):
        merged_weights(nn.Sequential(layer), lambda name: True)
