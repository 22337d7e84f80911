"""An adapted model as PEFT and transformers see it: saving, loading, dtypes, checkpointing."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from rankbits import BayesianLoraConfig, GateSchedule, harden
from rankbits.errors import RankbitsWarning
from rankbits.tuners.bayesian_lora import adapted_layers


def _float_state(model: nn.Module) -> dict[str, torch.dtype]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    marks = ("gates", "log_range", "maximum", "fixed_range")
    return {name: t.dtype for name, t in tensors if any(mark in name for mark in marks)}


def _checkpoint(model: nn.Module, use_reentrant: bool) -> None:
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_gates_and_ranges_stay_float32_on_a_bfloat16_base(bert, batch, autocast_adapter_dtype) -> None:
    config = BayesianLoraConfig(r=2, target_modules=["query"], init_weights=False, calibration_passes=1)
    model = get_peft_model(bert.to(torch.bfloat16), config, autocast_adapter_dtype=autocast_adapter_dtype).train()
    for _ in range(3):
        output = model(**batch)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert bool(torch.isfinite(output.logits).all())
    assert set(_float_state(model).values()) == {torch.float32}
    model.to(torch.float16)
    assert set(_float_state(model).values()) == {torch.float32}
    for _, layer in adapted_layers(model):
        assert layer.gates_of("default").bit_logits.grad.dtype == torch.float32


def test_autocast_computes_in_bfloat16_around_float32_quantizers(bert, batch, adapt) -> None:
    model = adapt(bert, target_modules=["query", "value"]).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            loss = model(**batch).loss
    loss.backward()
    assert set(_float_state(model).values()) == {torch.float32}
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    full = model.eval()(**batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(**batch).logits
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)


def test_ranges_are_exact_after_the_move_to_a_bfloat16_base(mlp, adapt) -> None:
    mlp = mlp.to(torch.bfloat16)
    largest = mlp[0].weight.detach().abs().max().float()
    ((_, layer),) = adapted_layers(adapt(mlp, target_modules=["0"]))
    torch.testing.assert_close(layer.bayesian_lora_quantizers["default"]["weight"].range_, largest, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(bert, batch, adapt, use_reentrant) -> None:
    model = adapt(bert, target_modules=["query", "value", "dense"], rank_gate="hard_concrete", dropout=0.1)
    model.train()
    for _ in range(3):
        model(**batch)
    model.enable_input_require_grads()

    def gradients() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(**batch).loss
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain_loss, plain = gradients()
    passes = {n: b.clone() for n, b in model.named_buffers() if n.endswith("passes")}
    _checkpoint(model, use_reentrant)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    loss, grads = gradients()
    assert loss == plain_loss
    assert plain.keys() == grads.keys()
    for name in plain:
        torch.testing.assert_close(grads[name], plain[name], rtol=1e-5, atol=1e-7, msg=name)
    assert all(torch.equal(b, passes[n]) for n, b in model.named_buffers() if n in passes)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_passes_do_not_count_as_calibration(bert, batch, adapt, use_reentrant) -> None:
    model = adapt(bert, target_modules=["query"], calibration_passes=50).train()
    model.enable_input_require_grads()
    _checkpoint(model, use_reentrant)
    for _ in range(3):
        model(**batch).loss.backward()
    passes = {int(b) for n, b in model.named_buffers() if n.endswith("down_output.passes")}
    assert passes == {3}


def test_saving_without_a_schedule_warns_and_saves(mlp, rows, adapt, tmp_path) -> None:
    model = adapt(mlp, target_modules=["0"])
    with pytest.warns(RankbitsWarning, match="'default' is saved, but its gate schedule was never stepped"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_saving_is_silent_after_a_step_and_without_gates(mlp, rows, adapt, tmp_path) -> None:
    model = adapt(mlp, target_modules=["0"])
    GateSchedule(model, 3).step()
    plain = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)),
        BayesianLoraConfig(r=2, target_modules=["0"], learn_bits=False, learn_rank=False),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "stepped")
        plain.save_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_learning_adapter_is_loaded_as_it_was_saved(
    bert, batch, adapt, learn, tmp_path, low_cpu_mem_usage, is_trainable
) -> None:
    base = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    model = adapt(bert, target_modules=["query", "dense"], modules_to_save=["classifier"])
    learn(model, rank=2, **batch)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    fresh = type(bert)(bert.config)
    fresh.load_state_dict(base)
    loaded = PeftModel.from_pretrained(
        fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable
    ).eval()
    assert torch.equal(loaded(**batch).logits, expected)
    assert any(p.requires_grad for p in loaded.parameters()) == is_trainable
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype
    loaded.save_pretrained(tmp_path / "again")


def test_an_adapter_can_be_loaded_under_another_name(mlp, rows, adapt, learn, tmp_path) -> None:
    base = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    model = adapt(mlp, target_modules=["0", "2"])
    learn(model, rows, rank=2)
    expected = model(rows)
    for kind in ("soft", "hard"):
        model.save_pretrained(tmp_path / kind)
        fresh = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
        fresh.load_state_dict(base)
        # A name that is also that of a quantizer.
        loaded = PeftModel.from_pretrained(fresh, tmp_path / kind, adapter_name="up").eval()
        torch.testing.assert_close(loaded(rows), expected, rtol=1e-5, atol=1e-6)
        harden(model)
    assert not [key for key in load_file(tmp_path / "hard" / "adapter_model.safetensors") if "default" in key]


def test_transformers_loads_the_adapter_folder(bert, batch, adapt, learn, tmp_path) -> None:
    base = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    model = adapt(bert, target_modules=["query", "value"])
    learn(model, rank=2, **batch)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    fresh = type(bert)(bert.config)
    fresh.load_state_dict(base)
    fresh.load_adapter(str(tmp_path))
    assert torch.equal(fresh.eval()(**batch).logits, expected)
