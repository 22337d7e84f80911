"""Decoders and models of two stacks, read from their configs, have every weight of the live models of transformers."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import BART, DECODERS, GPT2, LLAMA, MISTRAL, OPT, PHI, QWEN2, T5, TWO_STACKS, live, read
from transformers.pytorch_utils import Conv1D

from rankbits.accounting.architectures.read import Head, find_config
from rankbits.accounting.params import base_parameters
from rankbits.accounting.spec import Activation, Linear, ModelShape, Norm, Table
from rankbits.errors import ModelError

CASES = DECODERS | TWO_STACKS


def _live_sizes(model: torch.nn.Module) -> dict[str, int]:
    """Parameters by module, each tensor once, under the first name that it goes by."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + parameter.numel()
    return sizes


def _sizes(shape: ModelShape) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in shape.parts:
        if isinstance(part, Linear):
            weight = part.d_in * part.d_out if part.tied_to is None else 0
            sizes[part.name] = weight + part.bias * part.d_out
        elif isinstance(part, Table):
            sizes[part.name] = part.entries * part.width
        elif isinstance(part, Norm):
            sizes[part.name] = part.width * (1 + part.bias)
    return {name: size for name, size in sizes.items() if size}


@pytest.mark.parametrize("head", list(Head))
@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_every_weight_of_the_live_model_is_there_by_name_and_size(values: dict[str, Any], head: Head):
    model, shape = live(values, head, device="meta"), read(values, head)
    assert _sizes(shape) == _live_sizes(model)
    assert base_parameters(shape) == model.num_parameters()


@pytest.mark.parametrize("head", list(Head))
@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_linear_layers_have_the_shapes_and_biases_of_the_live_ones(values: dict[str, Any], head: Head):
    expected = {}
    for name, module in live(values, head, device="meta").named_modules():
        if isinstance(module, torch.nn.Linear):
            expected[name] = (module.in_features, module.out_features, module.bias is not None)
        elif isinstance(module, Conv1D):
            expected[name] = (module.nx, module.nf, True)
    assert {part.name: (part.d_in, part.d_out, part.bias) for part in read(values, head).linears()} == expected


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_an_activation_is_as_wide_as_what_follows_it(values: dict[str, Any]):
    parts = read(values, Head.CLASSIFICATION).parts
    pairs = [(part, after) for part, after in pairwise(parts) if isinstance(part, Activation)]
    assert pairs
    assert all((part.width, part.rows) == (after.d_in, after.rows) for part, after in pairs)


PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama2-7b": 6_738_415_616,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "qwen2-7b": 7_615_616_512,
    "phi-2": 2_779_683_840,
    "smollm2-135m": 134_515_008,
    "gpt3-175b": 174_604_283_904,
    "t5-base": 222_903_552,
    "bart-base": 139_420_416,
    "mt0-large": 1_229_581_312,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_models_at_full_size(name: str, parameters: int):
    values = find_config(name)
    sizes = _sizes(read(values, Head.LANGUAGE_MODEL))
    assert sum(sizes.values()) == parameters
    # transformers ties the head of every mT5 that it builds from a config alone.
    untied = sizes.keys() & {"lm_head"} if values["model_type"] == "mt5" else set()
    built = _live_sizes(live(values, Head.LANGUAGE_MODEL, device="meta"))
    assert {name: size for name, size in sizes.items() if name not in untied} == built


@pytest.mark.parametrize(
    ("values", "key", "given", "message"),
    [
        (LLAMA, "num_key_value_heads", 4, "a divisor of num_attention_heads, which is 6"),
        (LLAMA, "num_attention_heads", 7, "num_key_value_heads"),
        (LLAMA, "hidden_size", 0, "hidden_size: given 0"),
        (LLAMA, "hidden_size", 25, "a divisor of hidden_size"),
        (LLAMA, "vocab_size", None, "vocab_size"),
        (QWEN2, "num_key_value_heads", None, "num_key_value_heads"),
        (MISTRAL, "sliding_window", -1, "sliding_window: given -1"),
        (GPT2, "n_layer", "2", "n_layer: given '2'"),
        (GPT2, "add_cross_attention", True, "add_cross_attention: given True"),
        (PHI, "qk_layernorm", True, "qk_layernorm: given True"),
        (OPT, "layer_norm_elementwise_affine", False, "layer_norm_elementwise_affine: given False"),
        (T5, "d_kv", 0, "d_kv: given 0"),
        (T5, "num_heads", None, "num_heads"),
        (T5, "num_decoder_layers", -1, "num_decoder_layers: given -1"),
        (T5, "feed_forward_proj", "silly-gelu", "feed_forward_proj: given 'silly-gelu'"),
        (T5, "feed_forward_proj", "gated-gelu-new", "feed_forward_proj: given 'gated-gelu-new'"),
        (BART, "decoder_attention_heads", 7, "a divisor of d_model, which is 24"),
        (BART, "encoder_ffn_dim", None, "encoder_ffn_dim"),
        (BART, "max_position_embeddings", "64", "max_position_embeddings: given '64'"),
    ],
)
def test_what_cannot_be_counted_is_refused_with_its_key(values: dict[str, Any], key: str, given: object, message: str):
    with pytest.raises(ModelError, match="config of given") as caught:
        read(values | {key: given})
    assert message in str(caught.value)
