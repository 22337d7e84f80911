"""A model with MoRA adapters as PEFT and transformers see it: saved, loaded, mixed, trained."""

import copy
import pickle

import pytest
import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    mapping,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from rankbits import MoraConfig
from rankbits.tuners.mora import MoraLinear, MoraModel, MoraType

KINDS = [kind.value for kind in MoraType]


def _layers(model: nn.Module) -> list[MoraLinear]:
    return [module for module in model.modules() if isinstance(module, MoraLinear)]


def _adapted(bert, **settings) -> PeftModel:
    chosen = {"r": 2, "init_weights": False, "target_modules": ["query", "dense"]}
    return get_peft_model(bert, MoraConfig(**chosen | settings)).eval()


def test_peft_knows_the_method() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING["MORA"] is MoraConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["MORA"] is MoraModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["MORA"] == MoraModel.prefix == "mora_"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_is_loaded_as_it_was_saved(bert, batch, tmp_path, kind, low_cpu_mem_usage) -> None:
    base = copy.deepcopy(bert)
    model = _adapted(bert, mora_type=kind, r=1, modules_to_save=["classifier"])
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    matrices = {key for key in state if key.endswith(".mora_M")}
    assert len(matrices) == len(_layers(model)) == 9
    assert sum(state[key].numel() for key in matrices) == sum(
        layer.mora_M["default"].numel() for layer in _layers(model)
    )
    loaded = PeftModel.from_pretrained(
        base, tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    assert torch.equal(loaded.eval()(**batch).logits, expected)
    assert loaded.peft_config["other"].kind is MoraType(kind)


def test_transformers_loads_and_deletes_the_adapter(bert, batch, tmp_path) -> None:
    base = copy.deepcopy(bert)
    before = base(**batch).logits
    model = _adapted(bert)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path))
    assert torch.equal(base.eval()(**batch).logits, expected)
    base.disable_adapters()
    assert torch.equal(base(**batch).logits, before)
    base.enable_adapters()
    base.delete_adapter("default")
    assert not any("default" in layer.mora_M for layer in _layers(base))


def test_a_model_survives_a_copy_and_a_pickle(bert, batch) -> None:
    model = _adapted(bert)
    expected = model(**batch).logits
    assert torch.equal(copy.deepcopy(model)(**batch).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**batch).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_a_whole_model(bert, batch, kind) -> None:
    model = _adapted(bert, mora_type=kind, r=1)
    expected = model(**batch).logits
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)
    plain = model.merge_and_unload()
    assert not _layers(plain)
    torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_mixed_batches_are_refused(bert, batch) -> None:
    model = _adapted(bert)
    with pytest.raises(
        ValueError, match=r"adapter_names=\['default', '__base__'\] was given, but MoraModel cannot mix"
    ):
        model(**batch, adapter_names=["default", "__base__"])


def test_safe_merge_refuses_a_broken_matrix(bert) -> None:
    model = _adapted(bert, target_modules=["query"])
    layer = _layers(model)[0]
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.mora_M["default"][0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_a_new_adapter_that_is_not_active_is_frozen(bert) -> None:
    model = _adapted(bert)
    model.add_adapter("other", MoraConfig(r=1, target_modules=["key"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not [name for name in trained if "other" in name]


def test_pefts_conversion_to_lora_finds_the_update_of_a_sharing_type(bert, batch) -> None:
    model = _adapted(bert, mora_type="sharing", r=1, target_modules=["query"])
    expected, rank = model(**batch).logits, _layers(model)[0].forms["default"].side
    config, state = convert_to_lora(model, rank=rank, progressbar=False)
    assert len(state) == 2 * len(_layers(model))
    plain = get_peft_model(model.unload(), config).eval()
    assert not set_peft_model_state_dict(plain, state).unexpected_keys
    torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_of_a_whole_model(bert, batch, kind) -> None:
    model = _adapted(bert, mora_type=kind, r=1).train()
    model.enable_input_require_grads()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return [layer.mora_M["default"].grad.clone() for layer in _layers(model)]

    plain = gradients()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_training_learns_and_leaves_the_base_alone(bert, batch) -> None:
    model = _adapted(bert, init_weights=True, task_type="SEQ_CLS").train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
