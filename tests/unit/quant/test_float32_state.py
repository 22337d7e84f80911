"""Ranges and gate logits keep single precision when the model around them is cast, and still move with it."""

import copy

import pytest
import torch
from torch import nn

from rankbits.quant.float32_state import Float32State
from rankbits.quant.quantizer import Quantizer


class _State(Float32State):
    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor([0.1, 1.0 + 2.0**-20]))
        self.register_buffer("seen", torch.tensor(0.1))
        self.register_buffer("count", torch.tensor(3))


CASTS = {
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "bfloat16()": lambda module: module.bfloat16(),
    "type": lambda module: module.type(torch.float16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_state_keeps_its_type_and_value_while_its_neighbours_are_cast(cast):
    model = nn.ModuleDict({"state": _State(), "linear": nn.Linear(2, 2)})
    before = copy.deepcopy(model["state"].state_dict())
    cast(model)
    assert model["linear"].weight.dtype != torch.float32
    for name, tensor in model["state"].state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_children_keep_their_type_too():
    parent = _State()
    parent.add_module("child", nn.Linear(2, 2))
    parent.half()
    assert parent.child.weight.dtype == torch.float32


def test_gradients_keep_their_type():
    state = _State()
    state.logit.grad = torch.ones(2)
    state.half()
    assert state.logit.grad.dtype == torch.float32


def test_the_device_does_change():
    state = _State().to("meta", torch.bfloat16)
    assert {tensor.device.type for tensor in state.state_dict().values()} == {"meta"}
    assert state.logit.dtype == torch.float32
    assert state.to_empty(device="cpu").logit.device.type == "cpu"


def test_casting_returns_the_module():
    state = _State()
    assert state.to(torch.bfloat16) is state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantizer_in_a_half_precision_model_moves_by_less_than_its_resolution(dtype):
    quantizer = Quantizer(calibration_passes=0).to(dtype)
    quantizer.calibrate_to(torch.tensor([1.0 + 2.0**-15]))
    assert quantizer.range_.dtype == torch.float32
    assert quantizer.range_.item() == pytest.approx(1.0 + 2.0**-15, rel=1e-7)
    x = torch.tensor([0.4, -3.0], dtype=dtype)
    assert quantizer(x, torch.full((4,), 0.5), hard=False).dtype == dtype
