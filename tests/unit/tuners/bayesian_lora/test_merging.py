"""Merging is exact where it is offered and refused elsewhere; unmerging is exact always."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rankbits.errors import MergeError
from rankbits.tuners.bayesian_lora import adapted_layers

RANK_ONLY = {"learn_bits": False}
WEIGHTS_ONLY = {"quantizers": ["weight", "down", "diagonal", "up"]}


def _base_weights(model: nn.Module) -> list[torch.Tensor]:
    return [layer.get_base_layer().weight.detach().clone() for _, layer in adapted_layers(model)]


@pytest.mark.parametrize("settings", [RANK_ONLY, WEIGHTS_ONLY, RANK_ONLY | {"rank_gate": "hard_concrete"}])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(mlp, rows, adapt, learn, settings, training) -> None:
    model = adapt(mlp, target_modules=["0", "2"], **settings)
    learn(model, rows, rank=2)
    expected, before = model(rows), _base_weights(model)
    model.train(training)
    model.merge_adapter()
    model.eval()
    torch.testing.assert_close(model(rows), expected, rtol=1e-5, atol=1e-6)
    assert all(not torch.equal(a, b) for a, b in zip(before, _base_weights(model), strict=True))
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(before, _base_weights(model), strict=True))
    torch.testing.assert_close(model(rows), expected, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [RANK_ONLY, WEIGHTS_ONLY])
def test_merge_and_unload_leaves_a_plain_model_that_computes_the_same(mlp, rows, adapt, learn, settings) -> None:
    model = adapt(mlp, target_modules=["0", "2"], **settings)
    learn(model, rows, rank=3)
    expected = model(rows)
    merged = model.merge_and_unload(safe_merge=True)
    assert list(adapted_layers(merged)) == []
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(rows), expected, rtol=1e-5, atol=1e-6)


def test_merging_into_conv1d(adapt, learn) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    )
    model = adapt(GPT2LMHeadModel(config), target_modules=["c_attn"], **WEIGHTS_ONLY)
    inputs = {"input_ids": torch.randint(0, 50, (2, 5))}
    learn(model, rank=2, **inputs)
    expected, before = model(**inputs).logits, _base_weights(model)
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-6)
    assert _base_weights(model)[0].shape == before[0].shape == (32, 96)
    model.unmerge_adapter()
    assert torch.equal(before[0], _base_weights(model)[0])


@pytest.mark.parametrize("quantizers", [None, ["input"], ["down_output"], ["diagonal_output"], ["output"]])
def test_quantized_activations_are_refused_and_nothing_changes(mlp, rows, adapt, learn, quantizers) -> None:
    model = adapt(mlp, target_modules=["0", "2"], quantizers=quantizers)
    learn(model, rows)
    expected, before = model(rows), _base_weights(model)
    with pytest.raises(MergeError, match="cannot be merged exactly: it quantizes the activations") as failure:
        model.merge_adapter()
    assert all(site in str(failure.value) for site in quantizers or ["down_output", "diagonal_output", "output"])
    assert "learn_bits=False" in str(failure.value)
    assert all(torch.equal(a, b) for a, b in zip(before, _base_weights(model), strict=True))
    assert all(not layer.merged for _, layer in adapted_layers(model))
    torch.testing.assert_close(model(rows), expected, rtol=0, atol=0)


def test_a_quantizing_adapter_is_merged_alone(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, target_modules=["0"], **WEIGHTS_ONLY)
    learn(model, rows)
    model.add_adapter("plain", type(model.peft_config["default"])(r=2, target_modules=["0"], **RANK_ONLY))
    before = _base_weights(model)
    with pytest.raises(MergeError, match=r"'default' quantizes the base weight.*not with \['plain'\]"):
        model.merge_adapter(["default", "plain"])
    assert torch.equal(before[0], _base_weights(model)[0])
    model.merge_adapter(["plain"])
    with pytest.raises(MergeError, match="only be merged alone"), pytest.warns(UserWarning, match="were merged plain"):
        model.merge_adapter(["default"])


def test_merging_twice_warns_and_changes_nothing(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, target_modules=["0"], **RANK_ONLY)
    learn(model, rows)
    model.merge_adapter()
    once = _base_weights(model)
    with pytest.warns(UserWarning, match="lready"):
        model.merge_adapter()
    assert torch.equal(once[0], _base_weights(model)[0])
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_safe_merge_refuses_a_broken_adapter_before_storing(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, target_modules=["0"], **RANK_ONLY)
    learn(model, rows)
    ((_, layer),) = adapted_layers(model)
    before = _base_weights(model)
    with torch.no_grad():
        layer.bayesian_lora_up["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        layer.merge(safe_merge=True)
    assert torch.equal(before[0], _base_weights(model)[0])
    assert layer.merged_adapters == []


def test_disabling_unmerges_and_returns_the_base_output(mlp, rows, adapt, learn) -> None:
    expected = mlp(rows)
    model = adapt(mlp, target_modules=["0", "2"], **RANK_ONLY)
    learn(model, rows)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(rows), expected, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [RANK_ONLY, WEIGHTS_ONLY])
def test_the_delta_is_what_merging_adds(mlp, rows, adapt, learn, settings) -> None:
    model = adapt(mlp, target_modules=["0"], **settings)
    learn(model, rows, rank=2)
    ((_, layer),) = adapted_layers(model)
    (before,), delta = _base_weights(model), layer.get_delta_weight("default")
    model.merge_adapter()
    torch.testing.assert_close(_base_weights(model)[0] - before, delta, rtol=0, atol=1e-6)
    assert layer.supports_lora_conversion() == (settings is RANK_ONLY)
    if settings is RANK_ONLY:
        assert int(torch.linalg.matrix_rank(delta, rtol=1e-4)) == 2
