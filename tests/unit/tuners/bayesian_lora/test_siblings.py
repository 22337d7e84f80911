"""Layers that read one tensor: one input quantizer, one width on request, made once and held by the first."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from rankbits import harden, summarize
from rankbits.quant.quantizer import Quantizer
from rankbits.tuners.bayesian_lora import adapted_layers
from rankbits.tuners.bayesian_lora.config import Site
from rankbits.tuners.bayesian_lora.reuse import SharedResult
from rankbits.tuners.bayesian_lora.siblings import sibling_names

QKV = {"target_modules": ["query", "key", "value"], "quantizers": ["weight", "input"], "placement": "merged"}


def _layers(model) -> dict[str, nn.Module]:
    return {name.rsplit(".", 1)[-1]: layer for name, layer in adapted_layers(model) if ".layer.0." in name}


def test_queries_own_the_quantizer_that_keys_and_values_use(bert, batch, adapt, learn) -> None:
    model = adapt(bert, **QKV)
    layers = _layers(model)
    owner = layers["query"]
    for name in ("key", "value"):
        assert layers[name].sites_of("default") == [Site.WEIGHT]
        assert layers[name].effective_sites("default") == [Site.WEIGHT, Site.INPUT]
        assert layers[name].quantizer_of("default", Site.INPUT) is owner.quantizer_of("default", Site.INPUT)
        assert layers[name].gate_of("default", Site.INPUT) == (owner.gates_of("default"), 1)
        assert layers[name].gates_of("default").bit_logits.shape == (1, 4)
    learn(model, **batch)
    with torch.no_grad():
        owner.gates_of("default").bit_logits[1] = torch.tensor([5.0, 5.0, -3.0, -3.0])
    assert [s.bits["input"] for s in summarize(model) if ".layer.0." in s.name] == [8, 8, 8]


def test_one_tensor_is_quantized_once_in_a_pass(bert, batch, adapt, learn, monkeypatch) -> None:
    model = adapt(bert, **QKV)
    learn(model, **batch)
    calls = []
    original = Quantizer.forward

    def counted(self, x, *args, **kwargs):
        calls.append(tuple(x.shape))
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(Quantizer, "forward", counted)
    for training in (False, True):
        model.train(training)
        calls.clear()
        model(**batch)
        assert calls.count((4, 8, 32)) == 2  # one for each block


def test_shared_and_separate_quantizers_compute_the_same_where_they_have_the_same_range(
    bert, batch, adapt, learn
) -> None:
    torch.manual_seed(0)
    shared = adapt(copy.deepcopy(bert), **QKV)
    torch.manual_seed(0)
    apart = adapt(bert, share_inputs=False, **QKV)
    for model in (shared, apart):
        learn(model, widths=False, **batch)
    torch.testing.assert_close(shared(**batch).logits, apart(**batch).logits)
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (shared, apart)]
    assert counts[1] - counts[0] == 2 * 2 * 5  # per block, for k and v: four gates and a range


def test_a_tied_width_is_the_owners(bert, batch, adapt, learn) -> None:
    model = adapt(bert, tie_groups="fused", **QKV)
    learn(model, **batch)
    layers = _layers(model)
    assert layers["key"].gates_of("default").bit_logits is None
    assert layers["key"].quantizers_of("default")["weight"] is not layers["query"].quantizers_of("default")["weight"]
    with torch.no_grad():
        layers["query"].gates_of("default").bit_logits[0] = torch.tensor([5.0, -3.0, -3.0, -3.0])
    assert [s.bits["weight"] for s in summarize(model) if ".layer.0." in s.name] == [4, 4, 4]
    assert layers["query"].macs_per_row("default") == [3 * 32 * 32, 3 * 32 * 32]
    model.train()
    model(**batch).loss.backward()
    assert layers["query"].gates_of("default").bit_logits.grad is not None


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_share_among_themselves(bert, batch, adapt, learn, how) -> None:
    model = adapt(bert, **QKV)
    learn(model, **batch)
    model.train()
    loss = model(**batch).loss
    copied = how(model)
    loss.backward()
    layers, others = _layers(model), _layers(copied)
    assert others["key"].quantizer_of("default", Site.INPUT) is others["query"].quantizers_of("default")["input"]
    assert others["key"].quantizer_of("default", Site.INPUT) is not layers["query"].quantizers_of("default")["input"]
    model.eval(), copied.eval()
    assert torch.equal(model(**batch).logits, copied(**batch).logits)


@pytest.mark.parametrize("tie", [None, "fused"])
def test_saved_and_hardened_adapters_load(bert, batch, adapt, learn, tmp_path, tie) -> None:
    from peft import PeftModel

    base = copy.deepcopy(bert)
    model = adapt(bert, tie_groups=tie, **QKV)
    learn(model, **batch)
    for folder in ("learning", "hardened"):
        expected = model(**batch).logits
        model.save_pretrained(tmp_path / folder)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        assert torch.equal(again(**batch).logits, expected), folder
        harden(model)


def test_a_second_adapter_shares_its_own(bert, batch, adapt) -> None:
    model = adapt(bert, **QKV)
    model.add_adapter("other", model.peft_config["default"])
    layers = _layers(model)
    owner = layers["query"].quantizer_of("other", Site.INPUT)
    assert layers["value"].quantizer_of("other", Site.INPUT) is owner
    assert owner is not layers["query"].quantizer_of("default", Site.INPUT)
    model.delete_adapter("other")
    assert layers["value"].effective_sites("other") == []


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_same_gates(bert, batch, adapt, learn, use_reentrant) -> None:
    model = adapt(bert, weight_gradient_rows=3, **QKV)
    learn(model, **batch)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(11)
        model(**batch).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_queries_of_cross_attention_read_another_tensor() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    own = model.decoder.block[0].layer[0].SelfAttention
    cross = model.decoder.block[0].layer[1].EncDecAttention
    assert sibling_names(own, "decoder.block.0.layer.0.SelfAttention.v") == ("q", "k", "v")
    assert sibling_names(cross, "decoder.block.0.layer.1.EncDecAttention.v") == ("k", "v")
    assert sibling_names(cross, "decoder.block.0.layer.1.EncDecAttention.q") == ("q",)


def test_a_layer_alone_has_no_siblings(bert: BertForSequenceClassification) -> None:
    block = bert.bert.encoder.layer[0]
    assert sibling_names(block.intermediate, "bert.encoder.layer.0.intermediate.dense") == ("dense",)


class TestSharedResult:
    """What a result is handed out for."""

    @staticmethod
    def _made(shared, x, reader, readers=3):
        calls = []
        result = shared.get(x, reader, readers, lambda: calls.append(1) or x * 2)
        return result, bool(calls)

    def test_is_made_once_for_each_round_of_readers(self) -> None:
        shared, x = SharedResult(), torch.ones(2)
        assert [self._made(shared, x, reader)[1] for reader in (1, 2, 3, 1, 2)] == [True, False, False, True, False]

    def test_a_reader_that_comes_again_starts_a_new_round(self) -> None:
        shared, x = SharedResult(), torch.ones(2)
        assert [self._made(shared, x, reader)[1] for reader in (1, 2, 1)] == [True, False, True]

    def test_another_tensor_or_a_changed_one_is_made_anew(self) -> None:
        shared, x = SharedResult(), torch.ones(2)
        self._made(shared, x, 1)
        assert self._made(shared, torch.ones(2), 2)[1]
        self._made(shared, x, 1)
        x.add_(1)
        assert self._made(shared, x, 2)[1]

    def test_a_result_without_graph_is_not_used_with_one(self) -> None:
        shared, x = SharedResult(), torch.ones(2, requires_grad=True)
        with torch.no_grad():
            self._made(shared, x, 1)
        result, made = self._made(shared, x, 2)
        assert made
        assert result.requires_grad
