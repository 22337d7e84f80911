"""Decoders read from their configs have the parts, names, sizes and order of the live models of transformers."""

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS
from tiny_models import DECODERS, GEMMA, GPT2, LABELS, LLAMA, MISTRAL, OPT, PHI, QWEN2, live, read

from rankbits.accounting.architectures.config import Head
from rankbits.accounting.spec import Activation, Attention, Linear, Rows
from rankbits.errors import ModelError

FAMILIES = [LLAMA, QWEN2, MISTRAL, GEMMA, PHI, OPT, GPT2]


@pytest.mark.parametrize("head", list(Head))
@pytest.mark.parametrize("values", DECODERS.values(), ids=DECODERS)
def test_parts_come_in_the_order_in_which_they_run(values, head):
    model, ran = live(values, head), []
    shape = read(values, head)
    named = {part.name for part in shape.parts if not isinstance(part, Attention | Activation)}
    for name, module in model.named_modules():
        if name in named:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        model(input_ids=torch.ones(1, 5, dtype=torch.long))
    parts = [part.name for part in shape.parts if part.name in named]
    assert ran == parts


@pytest.mark.parametrize("values", DECODERS.values(), ids=DECODERS)
def test_attentions_and_activations_are_named_after_live_modules(values):
    shape, modules = read(values), dict(live(values, device="meta").named_modules())
    others = [part for part in shape.parts if isinstance(part, Attention | Activation)]
    assert len(others) == 2 * shape.layers
    assert all(part.name in modules for part in others)


@pytest.mark.parametrize("values", DECODERS.values(), ids=DECODERS)
def test_attention_joins_the_layers_that_make_its_operands(values):
    shape = read(values)
    linears = {linear.name: linear for linear in shape.linears()}
    for attention in shape.attentions():
        fused = attention.queries == attention.keys == attention.values
        keys = attention.key_heads * attention.head_dim
        queries = attention.heads * attention.head_dim
        assert linears[attention.queries].d_out == queries + fused * 2 * keys
        assert linears[attention.keys].d_out == keys + fused * (queries + keys)
        assert linears[attention.values].d_out == linears[attention.keys].d_out
        assert attention.causal
        assert attention.rotary == (values["model_type"] not in {"opt", "gpt2"})


@pytest.mark.parametrize("values", FAMILIES, ids=lambda values: values["model_type"])
def test_the_shape_says_what_the_config_says(values):
    shape = read(values | {"torch_dtype": "bfloat16"})
    assert (shape.hidden, shape.layers, shape.max_length, shape.vocabulary) == (24, 2, 64, 96)
    assert (shape.name, shape.model_type, shape.stored_bits) == ("given", values["model_type"], 16)
    assert shape.decoder
    assert not shape.two_stacks
    assert list(shape.usual_targets) == USUAL_TARGETS[values["model_type"]]


def test_gated_and_plain_feed_forward_parts():
    assert {part.gated for part in read(QWEN2).parts if isinstance(part, Activation)} == {True}
    assert {part.gated for part in read(PHI).parts if isinstance(part, Activation)} == {False}


def test_heads():
    (score,) = [part for part in read(LLAMA, Head.CLASSIFICATION).linears() if part.name == "score"]
    assert score == Linear("score", 24, LABELS, bias=False, rows=Rows.TOKENS, op="head")
    (untied,) = [part for part in read(LLAMA, Head.LANGUAGE_MODEL).linears() if part.op == "head"]
    assert untied == Linear("lm_head", 24, 96, bias=False, rows=Rows.HEAD, op="head")
    (tied,) = [part for part in read(GPT2, Head.LANGUAGE_MODEL).linears() if part.op == "head"]
    assert tied == Linear("lm_head", 24, 96, bias=False, rows=Rows.HEAD, op="head", tied_to="transformer.wte")
    assert not [part for part in read(LLAMA).linears() if part.op == "head"]


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, [None, None]),
        ({"sliding_window": 8}, [None, None]),
        ({"use_sliding_window": True, "sliding_window": 8}, [None, None]),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, [None, 8]),
        ({"use_sliding_window": True, "max_window_layers": 0}, [4096, 4096]),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            [8, None],
        ),
    ],
)
def test_windows_of_qwen2_as_the_live_attentions_have_them(changes, windows):
    model = live(QWEN2 | changes, device="meta")
    assert [layer.self_attn.sliding_window for layer in model.layers] == windows
    assert [attention.window for attention in read(QWEN2 | changes).attentions()] == windows


@pytest.mark.parametrize("window", [8, None])
def test_windows_of_mistral(window):
    assert [a.window for a in read(MISTRAL | {"sliding_window": window}).attentions()] == [window, window]


def test_layer_types_of_another_length_are_refused():
    with pytest.raises(ModelError, match="one type for each of 2 layers"):
        read(QWEN2 | {"use_sliding_window": True, "layer_types": ["full_attention"]})
