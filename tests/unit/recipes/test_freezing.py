"""Freezing rules train what they say on every architecture, as many weights as an estimate counts, and save it all."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rankbits.accounting.architectures.config import Head
from rankbits.accounting.architectures.read import read_shape
from rankbits.accounting.params import count
from rankbits.accounting.spec import Method, MethodSpec
from rankbits.accounting.trained import above_body
from rankbits.errors import ModelError
from rankbits.recipes.freezing import Freezing, block_stack, freeze, head_parameters, save_whole

USUAL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
GROUPED = {**USUAL, "num_key_value_heads": 1, "tie_word_embeddings": False}
STACKS = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": USUAL,
    "roberta": USUAL,
    "distilbert": {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 2},
    "deberta-v2": {**USUAL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 16},
    "llama": GROUPED,
    "qwen2": GROUPED,
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "pad_token_id": 0},
    "opt": {**USUAL, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "t5": {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 2,
    },
    "bart": STACKS,
}
STACK = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "deberta-v2": "deberta.encoder.layer",
    "llama": "model.layers",
    "qwen2": "model.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "t5": "transformer.decoder.block",
    "bart": "model.decoder.layers",
}


def _config(kind: str) -> Any:
    return AutoConfig.for_model(kind, **CONFIGS[kind], num_labels=3)


def _classifier(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(_config(kind))


def _trained(model: nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_rule_trains_its_weights_and_as_many_as_an_estimate_counts(kind: str) -> None:
    model = _classifier(kind)
    name, stack = block_stack(model)
    assert (name, len(stack)) == (STACK[kind], 2 if kind in {"t5", "bart"} else 3)
    shape = read_shape(_config(kind).to_dict(), name=kind, head=Head.CLASSIFICATION, num_labels=3)
    own = above_body(shape)

    everything = sum(parameter.numel() for parameter in model.parameters())
    freeze(model, Freezing.FULL)
    assert sum(_trained(model).values()) == everything == count(shape, MethodSpec(Method.FULL)).trainable

    freeze(model, Freezing.TOP_LAYER, layers=1)
    top = _trained(model)
    last = {f"{name}.{len(stack) - 1}.{inner}" for inner, _ in stack[-1].named_parameters()}
    assert last <= set(top)
    assert not any(other.startswith(tuple(f"{name}.{index}." for index in range(len(stack) - 1))) for other in top)
    counted = count(shape, MethodSpec(Method.TOP_LAYER, layers=1, trained_in_full=own))
    assert sum(top.values()) == counted.trainable

    freeze(model, Freezing.TOP_LAYER, layers=2)
    counted = count(shape, MethodSpec(Method.TOP_LAYER, layers=2, trained_in_full=own))
    assert sum(_trained(model).values()) == counted.trainable

    freeze(model, Freezing.FEATURE_BASED)
    head = _trained(model)
    assert set(head) == set(top) - last
    assert not any(inner.startswith(f"{model.base_model_prefix}.") for inner in head)
    assert sum(head.values()) == count(shape, MethodSpec(Method.FEATURE_BASED, trained_in_full=own)).trainable
    assert sum(parameter.numel() for parameter in head_parameters(model)) == sum(head.values())
    assert own
    # Nothing has to be named: these are the weights that the method means.
    assert count(shape, MethodSpec(Method.FEATURE_BASED)).trainable == sum(head.values())
    assert count(shape, MethodSpec(Method.TOP_LAYER, layers=1)).trainable == sum(top.values())


def test_features_are_fixed_and_the_head_still_drops_out() -> None:
    model = freeze(_classifier("bert"), Freezing.FEATURE_BASED)
    seen: list[bool] = []
    model.dropout.register_forward_hook(lambda module, *_: seen.append(module.training))
    features: list[torch.Tensor] = []
    model.bert.register_forward_hook(lambda _module, _inputs, output: features.append(output.pooler_output))
    ids = torch.tensor([[1, 2, 3, 4]])
    for _ in range(2):
        model.train()
        model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
    assert torch.equal(*features)
    assert not features[0].requires_grad
    assert seen == [True, True]
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_step_moves_what_trains_and_nothing_else() -> None:
    for rule in Freezing:
        model = freeze(_classifier("distilbert"), rule)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model.train()(input_ids=torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([1])).loss.backward()
        optimizer.step()
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        unmoved = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
        # The bias of keys cancels in the softmax; rows of tokens that did not occur have no gradient.
        assert frozen <= unmoved, rule
        assert unmoved - frozen <= {name for name in before if name.endswith("k_lin.bias")}, rule


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_head_that_is_the_table_of_embeddings_does_not_train_alone(kind: str) -> None:
    config = _config(kind)
    config.tie_word_embeddings = True
    tied = AutoModelForCausalLM.from_config(config)
    before = _trained(tied)
    with pytest.raises(ModelError, match="tied to the table of embeddings cannot train without changing every feature"):
        freeze(tied, Freezing.FEATURE_BASED)
    assert _trained(tied) == before
    shape = read_shape(config.to_dict(), name=kind, head=Head.LANGUAGE_MODEL)
    with pytest.raises(ModelError, match="does not have for itself: it is the table of embeddings"):
        count(shape, MethodSpec(Method.FEATURE_BASED))
    freeze(tied, Freezing.TOP_LAYER)
    assert count(shape, MethodSpec(Method.TOP_LAYER, layers=1)).trainable == sum(_trained(tied).values())
    assert all(name.startswith(f"{STACK[kind]}.2.") for name in _trained(tied))
    config.tie_word_embeddings = False
    untied = freeze(AutoModelForCausalLM.from_config(config), Freezing.FEATURE_BASED)
    assert list(_trained(untied)) == ["lm_head.weight"]
    shape = read_shape(config.to_dict(), name=kind, head=Head.LANGUAGE_MODEL)
    assert count(shape, MethodSpec(Method.FEATURE_BASED)).trainable == sum(_trained(untied).values())


def test_named_modules_train_besides() -> None:
    model = freeze(_classifier("bert"), Freezing.FEATURE_BASED, also=["pooler"])
    assert {name.rpartition(".")[0] for name in _trained(model)} == {"classifier", "bert.pooler.dense"}


def test_too_many_blocks_or_none_are_refused() -> None:
    model = _classifier("bert")
    for layers in (0, 4):
        with pytest.raises(
            ModelError, match=f"given {layers} top blocks of bert.encoder.layer to train, expected 1 to"
        ):
            freeze(model, Freezing.TOP_LAYER, layers=layers)
    with pytest.raises(ModelError, match="Linear has no list of equal blocks"):
        block_stack(nn.Linear(2, 2))


def test_experts_inside_blocks_are_no_stack() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(2))
    assert block_stack(model)[0] == "layers"


class _Tokenizer:
    def save_pretrained(self, folder: str) -> None:
        self.folder = folder


def test_the_whole_model_is_saved(tmp_path) -> None:
    model = freeze(_classifier("bert"), Freezing.FEATURE_BASED)
    tokenizer = _Tokenizer()
    save_whole(model, tokenizer, tmp_path)
    assert tokenizer.folder == str(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in model.state_dict().items())
