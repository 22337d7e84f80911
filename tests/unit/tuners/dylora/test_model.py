"""An adapted model as PEFT and transformers see it: ranks saved, adapters beside each other, half precision."""

import subprocess
import sys
from random import Random

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from rankbits import DyloraConfig, DyloraSchedule, set_rank
from rankbits.accounting.architectures.read import Head, read_shape
from rankbits.accounting.measure import cost
from rankbits.accounting.params import count
from rankbits.accounting.spec import Method, MethodSpec
from rankbits.tuners.dylora import adapted_layers


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("hidden", "ffn", "layers", "r", "expected"),
    [(768, 3072, 12, 8, 294_912), (32, 48, 2, 3, None)],
    ids=["RoBERTa-base and DeBERTaV3-base, q and v", "small"],
)
def test_parameters_are_those_of_the_formula(hidden, ffn, layers, r, expected) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=ffn
    )
    with torch.device("meta"):
        base = BertModel(config)
    model = get_peft_model(base, DyloraConfig(r=r, target_modules=["query", "value"]))
    shape = read_shape(config.to_dict(), name="given", head=Head.NONE)
    assert _trained(model) == count(shape, MethodSpec(Method.DYLORA, rank=r, targets=("query", "value"))).trainable
    if expected is not None:
        assert _trained(model) == expected


@pytest.mark.parametrize("rank", [1, 3])
def test_a_live_model_costs_what_its_rank_runs(bert, dylora, rank) -> None:
    model = dylora(bert, target_modules=["query"]).eval()
    base = cost(model, sequence_length=4, adapters="unmerged").macs
    set_rank(model, rank)
    # Four ranks less `rank` in two layers, on four rows of 32 inputs and 32 outputs each.
    assert base - cost(model, sequence_length=4, adapters="unmerged").macs == (4 - rank) * 2 * 4 * (32 + 32)


def test_the_rank_is_saved_and_loaded(bert, batch, dylora, tmp_path) -> None:
    state = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    model = dylora(bert, target_modules=["query", "dense"]).eval()
    full = model(**batch).logits
    set_rank(model, 2)
    expected = model(**batch).logits
    assert not torch.equal(full, expected)
    schedule = DyloraSchedule(model)
    schedule.step()
    model.save_pretrained(tmp_path)
    fresh = type(bert)(bert.config)
    fresh.load_state_dict(state)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert loaded.peft_config["default"].evaluation_rank == 2
    assert torch.equal(loaded(**batch).logits, expected)
    set_rank(loaded, 4)
    assert torch.equal(loaded(**batch).logits, full)


def test_another_process_computes_the_same(mlp, rows, dylora, tmp_path) -> None:
    torch.save({"base": mlp.state_dict(), "x": rows}, tmp_path / "given.pt")
    model = dylora(mlp, target_modules=["0", "2"]).eval()
    set_rank(model, 3)
    torch.save(model(rows).detach(), tmp_path / "expected.pt")
    model.save_pretrained(tmp_path / "adapter")
    code = """
import rankbits, torch
from peft import PeftModel
from torch import nn
given = torch.load("given.pt")
base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
base.load_state_dict(given["base"])
model = PeftModel.from_pretrained(base, "adapter").eval()
print(torch.equal(model(given["x"]), torch.load("expected.pt")))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert answer.stdout == "True\n", answer.stderr


def test_transformers_loads_the_adapter_folder(bert, batch, dylora, tmp_path) -> None:
    state = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    model = dylora(bert, target_modules=["query", "value"]).eval()
    set_rank(model, 2)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    fresh = type(bert)(bert.config)
    fresh.load_state_dict(state)
    fresh.load_adapter(str(tmp_path))
    assert torch.equal(fresh.eval()(**batch).logits, expected)


def test_adapters_are_switched_summed_disabled_and_deleted(mlp, rows, dylora) -> None:
    expected = mlp(rows)
    model = dylora(mlp, target_modules=["0"], r=4).eval()
    model.add_adapter("other", DyloraConfig(r=2, alpha=3.0, target_modules=["0"], init_weights=False))
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "other" in name]
    set_rank(model, 1)
    first = model(rows)
    model.set_adapter("other")
    second = model(rows)
    with pytest.raises(ValueError, match=r"rank must be an integer in \[1, 2\].*'other', got 4"):
        set_rank(model, 4, "other")
    with pytest.raises(ValueError, match=r"no DyLoRA adapter 'third'; it has \['default', 'other'\]"):
        set_rank(model, 1, "third")
    ((_, layer),) = adapted_layers(model)
    layer.set_adapter(["default", "other"])
    hidden = layer(rows)
    deltas = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    torch.testing.assert_close(hidden, layer.base_layer(rows) + rows @ deltas.T, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        assert torch.equal(model(rows), expected)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(model(rows), second)
    assert not torch.equal(first, second)
    assert all("default" not in getattr(layer, name) for name in layer.other_param_names + layer.adapter_layer_names)


def test_a_batch_of_mixed_adapters_is_refused(mlp, rows, dylora) -> None:
    model = dylora(mlp, target_modules=["0"])
    with pytest.raises(ValueError, match="DyloraModel cannot mix adapters"):
        model(rows, adapter_names=["default"] * 7)


def test_injected_adapters_have_ranks_too(mlp, rows) -> None:
    model = inject_adapter_in_model(DyloraConfig(r=4, target_modules=["0", "2"], init_weights=False), mlp).eval()
    before = model(rows)
    set_rank(model, 1)
    assert not torch.equal(model(rows), before)
    assert model.peft_config["default"].evaluation_rank == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mode", ["frozen", "prefix"])
def test_recomputed_passes_use_the_rank_of_the_step(bert, batch, dylora, use_reentrant, mode) -> None:
    model = dylora(bert, target_modules=["query", "value", "dense"], train_mode=mode, dropout=0.1).train()
    model.enable_input_require_grads()
    schedule = DyloraSchedule(model, seed=1)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": use_reentrant})
    recomputed = gradients()
    assert plain.keys() == recomputed.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad, rtol=1e-5, atol=1e-7, msg=name)
    assert schedule.ranks() == {"default": 1 + int(4 * Random("1/0").random())}


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_bfloat16_base_keeps_its_dtype(bert, batch, autocast_adapter_dtype) -> None:
    config = DyloraConfig(r=2, target_modules=["query"], init_weights=False)
    model = get_peft_model(bert.to(torch.bfloat16), config, autocast_adapter_dtype=autocast_adapter_dtype).train()
    output = model(**batch)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    own = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "dylora_" in n} == {own}
    model.merge_adapter()


def test_autocast_computes_in_bfloat16(bert, batch, dylora) -> None:
    model = dylora(bert, target_modules=["query", "value"]).eval()
    full = model(**batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(**batch)
    half.loss.backward()
    torch.testing.assert_close(half.logits.float(), full, rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.float32 for n, p in model.named_parameters() if "dylora_" in n)


def test_gpt2_is_merged_at_a_chosen_rank(dylora) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2)).eval()
    model = dylora(base, target_modules=["c_attn", "c_proj"]).eval()
    inputs = {"input_ids": torch.randint(0, 50, (2, 5))}
    set_rank(model, 2)
    expected = model(**inputs).logits
    merged = model.merge_and_unload()
    assert list(adapted_layers(merged)) == []
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
