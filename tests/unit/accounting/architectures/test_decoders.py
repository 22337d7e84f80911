"""Decoders read from their configs have the parts, names, sizes and order of the live models of transformers."""

import json
from importlib.resources import files
from itertools import pairwise

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from rankbits.accounting.architectures.config import Config, Head
from rankbits.accounting.architectures.decoders import READERS
from rankbits.accounting.params import base_parameters
from rankbits.accounting.spec import Activation, Attention, Linear, ModelShape, Norm, Rows, Table
from rankbits.errors import ModelError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
QWEN2 = LLAMA | {"model_type": "qwen2"}
MISTRAL = LLAMA | {"model_type": "mistral"}
GEMMA = LLAMA | {"model_type": "gemma", "head_dim": 8}
PHI = LLAMA | {"model_type": "phi", "num_key_value_heads": None}
OPT = {
    "model_type": "opt",
    "vocab_size": 96,
    "hidden_size": 24,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 64}
FAMILIES = [LLAMA, QWEN2, MISTRAL, GEMMA, PHI, OPT, GPT2]
CASES = {
    "llama": LLAMA,
    "llama whole heads": LLAMA | {"num_key_value_heads": None},
    "llama tied": LLAMA | {"tie_word_embeddings": True},
    "llama biased": LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 10},
    "qwen2": QWEN2,
    "qwen2 tied": QWEN2 | {"tie_word_embeddings": True},
    "mistral": MISTRAL | {"head_dim": 10},
    "gemma": GEMMA,
    "gemma biased": GEMMA | {"attention_bias": True, "tie_word_embeddings": False},
    "phi": PHI,
    "phi grouped": PHI | {"num_key_value_heads": 3, "tie_word_embeddings": True},
    "opt": OPT,
    "opt projected": OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "opt bare": OPT | {"enable_bias": False, "_remove_final_layer_norm": True, "tie_word_embeddings": False},
    "gpt2": GPT2,
    "gpt2 narrow": GPT2 | {"n_inner": 30, "tie_word_embeddings": False},
}
BUILDERS = {
    Head.NONE: AutoModel,
    Head.LANGUAGE_MODEL: AutoModelForCausalLM,
    Head.CLASSIFICATION: AutoModelForSequenceClassification,
}
LABELS = 3


def _read(values: dict, head: Head = Head.NONE, num_labels: int = LABELS) -> ModelShape:
    return READERS[values["model_type"]](Config(values, name="given"), head, num_labels)


def _live(values: dict, head: Head, device: str = "meta") -> torch.nn.Module:
    config = AutoConfig.for_model(**values, num_labels=LABELS, pad_token_id=0)
    with torch.device(device):
        return BUILDERS[head].from_config(config, attn_implementation="eager").eval()


def _published(name: str) -> dict:
    return json.loads(files("rankbits.accounting").joinpath(f"shapes/{name}.json").read_text(encoding="utf-8"))


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
def test_every_weight_of_the_live_model_is_there_by_name_and_size(values, head):
    model, shape = _live(values, head), _read(values, head)
    assert _sizes(shape) == _live_sizes(model)
    assert base_parameters(shape) == model.num_parameters()


@pytest.mark.parametrize("head", list(Head))
@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_linear_layers_have_the_shapes_and_biases_of_the_live_ones(values, head):
    live = {}
    for name, module in _live(values, head).named_modules():
        if isinstance(module, torch.nn.Linear):
            live[name] = (module.in_features, module.out_features, module.bias is not None)
        elif isinstance(module, Conv1D):
            live[name] = (module.nx, module.nf, True)
    assert {part.name: (part.d_in, part.d_out, part.bias) for part in _read(values, head).linears()} == live


@pytest.mark.parametrize("head", list(Head))
@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_parts_come_in_the_order_in_which_they_run(values, head):
    model, ran = _live(values, head, "cpu"), []
    shape = _read(values, head)
    named = {part.name for part in shape.parts if not isinstance(part, Attention | Activation)}
    for name, module in model.named_modules():
        if name in named:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        model(input_ids=torch.ones(1, 5, dtype=torch.long))
    parts = [part.name for part in shape.parts if part.name in named]
    assert ran == parts


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_attentions_and_activations_are_named_after_live_modules(values):
    shape, modules = _read(values), dict(_live(values, Head.NONE).named_modules())
    others = [part for part in shape.parts if isinstance(part, Attention | Activation)]
    assert len(others) == 2 * shape.layers
    assert all(part.name in modules for part in others)


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_attention_joins_the_layers_that_make_its_operands(values):
    shape = _read(values)
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


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_an_activation_is_as_wide_as_what_follows_it(values):
    parts = _read(values, Head.CLASSIFICATION).parts
    pairs = [(part, after) for part, after in pairwise(parts) if isinstance(part, Activation)]
    assert pairs
    assert all((part.width, part.rows) == (after.d_in, after.rows) for part, after in pairs)


@pytest.mark.parametrize("values", FAMILIES, ids=lambda values: values["model_type"])
def test_the_shape_says_what_the_config_says(values):
    shape = _read(values | {"torch_dtype": "bfloat16"})
    assert (shape.hidden, shape.layers, shape.max_length, shape.vocabulary) == (24, 2, 64, 96)
    assert (shape.name, shape.model_type, shape.stored_bits) == ("given", values["model_type"], 16)
    assert shape.decoder
    assert not shape.two_stacks
    assert list(shape.usual_targets) == USUAL_TARGETS[values["model_type"]]


def test_gated_and_plain_feed_forward_parts():
    assert {part.gated for part in _read(QWEN2).parts if isinstance(part, Activation)} == {True}
    assert {part.gated for part in _read(PHI).parts if isinstance(part, Activation)} == {False}


def test_heads():
    (score,) = [part for part in _read(LLAMA, Head.CLASSIFICATION).linears() if part.name == "score"]
    assert score == Linear("score", 24, LABELS, bias=False, rows=Rows.TOKENS, op="head")
    (untied,) = [part for part in _read(LLAMA, Head.LANGUAGE_MODEL).linears() if part.op == "head"]
    assert untied == Linear("lm_head", 24, 96, bias=False, rows=Rows.HEAD, op="head")
    (tied,) = [part for part in _read(GPT2, Head.LANGUAGE_MODEL).linears() if part.op == "head"]
    assert tied == Linear("lm_head", 24, 96, bias=False, rows=Rows.HEAD, op="head", tied_to="transformer.wte")
    assert not [part for part in _read(LLAMA).linears() if part.op == "head"]


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
    model = _live(QWEN2 | changes, Head.NONE)
    assert [layer.self_attn.sliding_window for layer in model.layers] == windows
    assert [attention.window for attention in _read(QWEN2 | changes).attentions()] == windows


@pytest.mark.parametrize("window", [8, None])
def test_windows_of_mistral(window):
    assert [a.window for a in _read(MISTRAL | {"sliding_window": window}).attentions()] == [window, window]


@pytest.mark.parametrize(
    ("name", "head", "parameters"),
    [
        ("llama-7b", Head.LANGUAGE_MODEL, 6_738_415_616),
        ("llama-13b", Head.LANGUAGE_MODEL, 13_015_864_320),
        ("llama2-7b", Head.LANGUAGE_MODEL, 6_738_415_616),
        ("llama2-70b", Head.LANGUAGE_MODEL, 68_976_648_192),
        ("llama3-8b", Head.LANGUAGE_MODEL, 8_030_261_248),
        ("qwen2-7b", Head.LANGUAGE_MODEL, 7_615_616_512),
        ("phi-2", Head.LANGUAGE_MODEL, 2_779_683_840),
        ("smollm2-135m", Head.LANGUAGE_MODEL, 134_515_008),
        ("gpt3-175b", Head.LANGUAGE_MODEL, 174_604_283_904),
    ],
)
def test_published_models_at_full_size(name, head, parameters):
    values = _published(name)
    sizes = _sizes(_read(values, head))
    assert sizes == _live_sizes(_live(values, head))
    assert sum(sizes.values()) == parameters


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
    ],
)
def test_what_cannot_be_counted_is_refused_with_its_key(values, key, given, message):
    with pytest.raises(ModelError, match="config of given") as caught:
        _read(values | {key: given})
    assert message in str(caught.value)


def test_layer_types_of_another_length_are_refused():
    with pytest.raises(ModelError, match="one type for each of 2 layers"):
        _read(QWEN2 | {"use_sliding_window": True, "layer_types": ["full_attention"]})
