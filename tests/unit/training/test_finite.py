"""The first layer and the first gradient that are not finite are found and named."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from rankbits.errors import NonFiniteError
from rankbits.training.callback import FiniteLossCallback
from rankbits.training.finite import first_non_finite_gradient, first_non_finite_module


class Model(nn.Module):
    """Two layers, a dictionary in between, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        self.head = nn.Linear(3, 1)
        self.bad_loss = False

    def forward(self, x: Tensor) -> SimpleNamespace:
        loss = self.head(self.body(x)).mean()
        return SimpleNamespace(loss=loss * float("nan") if self.bad_loss else loss)


class Parts(nn.Module):
    """Returns its parts in containers."""

    def forward(self, x: Tensor) -> dict:
        return {"parts": ([x], torch.arange(3)), "name": "x"}


def _break(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.bias[0] = float("inf")


@pytest.mark.parametrize("layer", ["body.0", "body.2", "head"])
def test_the_first_innermost_module_is_named(layer) -> None:
    model = Model()
    assert first_non_finite_module(model, (torch.randn(2, 3),), {}) is None
    _break(model.get_submodule(layer))
    # tanh makes an infinite input finite again
    assert first_non_finite_module(model, (), {"x": torch.randn(2, 3)}) == layer
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_in_containers_are_searched() -> None:
    model = nn.Sequential(Parts())
    assert first_non_finite_module(model, (torch.ones(2),), {}) is None
    assert first_non_finite_module(model, (torch.tensor([1.0, float("nan")]),), {}) == "0"


def test_the_first_bad_gradient_is_named() -> None:
    model = Model()
    model(torch.randn(2, 3)).loss.backward()
    assert first_non_finite_gradient(model) is None
    model.body[2].weight.grad[0, 0] = float("nan")
    model.head.weight.grad[0, 0] = float("inf")
    assert first_non_finite_gradient(model) == "body.2.weight"


def test_a_bad_loss_stops_training_and_names_the_layer_and_the_step() -> None:
    model = Model()
    callback = FiniteLossCallback(model)
    model(torch.randn(2, 3))
    callback.on_step_end(None, SimpleNamespace(global_step=6), None)
    _break(model.body[2])
    with pytest.raises(NonFiniteError, match=r"the loss became (-?inf|nan) at step 7; .*is 'body\.2'"):
        model(torch.randn(2, 3))


def test_a_bad_loss_of_finite_layers_is_said_to_be_one() -> None:
    model = Model()
    FiniteLossCallback(model)
    model.bad_loss = True
    with pytest.raises(NonFiniteError, match="at step 1; every layer is finite"):
        model(torch.randn(2, 3))


def test_evaluation_is_left_alone() -> None:
    model = Model()
    FiniteLossCallback(model)
    _break(model.head)
    assert not bool(model.eval()(torch.randn(2, 3)).loss.isfinite())


def test_counting_starts_where_training_resumes() -> None:
    model = Model()
    callback = FiniteLossCallback(model)
    callback.on_train_begin(None, SimpleNamespace(global_step=40), None)
    _break(model.head)
    with pytest.raises(NonFiniteError, match="at step 41"):
        model(torch.randn(2, 3))


def test_a_bad_gradient_stops_training_before_the_optimizer() -> None:
    model = Model()
    callback = FiniteLossCallback(model)
    model(torch.randn(2, 3)).loss.backward()
    callback.on_pre_optimizer_step(None, None, None, model=model)
    model.head.weight.grad[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the gradient of 'head\.weight' became NaN or infinite at step 1"):
        callback.on_pre_optimizer_step(None, None, None, model=model)
