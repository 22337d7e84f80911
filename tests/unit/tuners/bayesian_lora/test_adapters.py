"""Several adapters on one model: which may be active together, and what is left when one goes."""

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from rankbits import BayesianLoraConfig, GateSchedule, regularization_loss, summarize
from rankbits.tuners.bayesian_lora import adapted_layers

TARGETS = ["0", "2"]


def _config(**settings):
    return BayesianLoraConfig(
        **({"r": 2, "target_modules": TARGETS, "init_weights": False, "calibration_passes": 1} | settings)
    )


def test_two_rank_only_adapters_add_up(mlp, rows) -> None:
    targets = {"target_modules": ["0"], "learn_bits": False}
    model = get_peft_model(mlp, _config(**targets)).eval()
    model.add_adapter("other", _config(r=3, **targets))
    ((_, layer),) = adapted_layers(model)
    base = layer.base_layer(rows)
    deltas = []
    for name in ("default", "other"):
        model.set_adapter(name)
        deltas.append(layer(rows) - base)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(rows), base + deltas[0] + deltas[1], rtol=1e-5, atol=1e-6)
    assert float(deltas[0].detach().abs().max()) > 1e-4
    assert not torch.allclose(deltas[0], deltas[1])


@pytest.mark.parametrize("first_learns", [False, True])
def test_an_adapter_with_quantizers_is_active_alone(mlp, rows, first_learns) -> None:
    model = get_peft_model(mlp, _config(learn_bits=first_learns))
    model.add_adapter("other", _config(learn_bits=True))
    with pytest.raises(ValueError, match="at most one Bayesian-LoRA adapter with quantizers can be active"):
        model.base_model.set_adapter(["default", "other"])
    for name in ("default", "other"):
        model.set_adapter(name)
        model.train()(rows)


def test_switching_adapters_switches_outputs_and_trainability(mlp, rows, learn) -> None:
    model = get_peft_model(mlp, _config())
    learn(model, rows)
    first = model(rows)
    model.add_adapter("other", _config(learn_bits=False))
    assert torch.equal(model(rows), first), "an added adapter is not active"
    model.set_adapter("other")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("other" in name for name in trained)
    assert not torch.allclose(model.eval()(rows), first)
    model.set_adapter("default")
    assert torch.equal(model(rows), first)


@pytest.mark.parametrize("learn_bits", [False, True])
def test_disabling_returns_the_base_output_exactly(mlp, rows, learn, learn_bits) -> None:
    expected = mlp(rows)
    model = get_peft_model(mlp, _config(learn_bits=learn_bits))
    learn(model, rows)
    assert not torch.allclose(model(rows), expected)
    with model.disable_adapter():
        assert torch.equal(model(rows), expected)
        assert torch.equal(model.train()(rows), expected)
    assert not torch.allclose(model.eval()(rows), expected)


def test_deleting_an_adapter_leaves_nothing_of_it(mlp, rows, learn) -> None:
    model = get_peft_model(mlp, _config(learn_bits=False))
    model.add_adapter("doomed", _config(dropout=0.1))
    model.set_adapter("doomed")
    learn(model, rows)
    model.set_adapter("default")
    model.delete_adapter("doomed")
    assert [name for name in model.state_dict() if "doomed" in name] == []
    for _, layer in adapted_layers(model):
        names = (*layer.adapter_layer_names, *layer.other_param_names)
        assert [name for name in names if "doomed" in getattr(layer, name)] == []
        assert "doomed" not in layer.frozen_peft_weight_names
        assert layer.active_adapters == ["default"]
    model(rows)


def test_deleting_after_the_fixed_phase_leaves_no_freeze(mlp, rows, learn) -> None:
    model = get_peft_model(mlp, _config())
    learn(model, rows)
    GateSchedule(model, 4, phases=(0.0, 0.0, 0.5)).restore(3)
    model.delete_adapter("default")
    model.add_adapter("default", _config())
    model.set_adapter("default")
    for _, layer in adapted_layers(model):
        assert all(p.requires_grad for p in layer.gates_of("default").parameters())


def test_adapter_names_are_refused_and_nothing_is_answered(mlp, rows) -> None:
    model = get_peft_model(mlp, _config(learn_bits=False))
    with pytest.raises(ValueError, match=r"adapter_names=\['__base__'\].*cannot mix adapters.*set_adapter"):
        model(rows, adapter_names=["__base__"])


class _Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x)


def test_an_unsupported_layer_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match=r"target module 'table' is a Embedding.*torch\.nn\.Linear.*Conv1D"):
        get_peft_model(_Embedded(), _config(target_modules=["table"]))


def test_injected_adapters_learn_without_a_peft_model(mlp, rows) -> None:
    model = inject_adapter_in_model(_config(), mlp)
    assert model is mlp
    model.train()
    for _ in range(3):
        model(rows)
    schedule = GateSchedule(model, 2, lambda_q=1.0, lambda_r=1.0, phases=(0.0, 0.0, 0.0))
    regularization_loss(model).backward()
    schedule.step()
    assert all(p.grad is not None for _, layer in adapted_layers(model) for p in layer.gates_of("default").parameters())
    assert [entry.name for entry in summarize(model)] == ["0", "2"]


def test_modules_to_save_are_trained_beside_the_adapter(bert, batch) -> None:
    model = get_peft_model(bert, _config(target_modules=["query"], modules_to_save=["classifier"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("classifier.modules_to_save" in name for name in trained)
    assert all("bayesian_lora_" in name or "classifier" in name for name in trained)
    model.train()(**batch).loss.backward()


def test_target_modules_none_takes_the_usual_ones_of_the_architecture(bert) -> None:
    model = get_peft_model(bert, BayesianLoraConfig(r=2))
    names = {name.rsplit(".", 1)[-1] for name, _ in adapted_layers(model)}
    assert names == {"query", "value"}
