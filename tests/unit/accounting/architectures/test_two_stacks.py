"""Models of two stacks, read from their configs, have the parts, names, sizes and order of the live models."""

import json
from importlib.resources import files
from itertools import pairwise

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from rankbits.accounting.architectures.config import Config, Head
from rankbits.accounting.architectures.two_stacks import READERS
from rankbits.accounting.params import base_parameters
from rankbits.accounting.spec import Activation, Attention, Linear, ModelShape, Norm, Rows, Table
from rankbits.errors import ModelError

T5 = {
    "model_type": "t5",
    "vocab_size": 96,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
}
MT5 = T5 | {"model_type": "mt5"}
BART = {
    "model_type": "bart",
    "vocab_size": 96,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_layers": 3,
    "decoder_ffn_dim": 30,
    "decoder_attention_heads": 6,
    "max_position_embeddings": 64,
}
CASES = {
    "t5": T5,
    "t5 gated": T5 | {"feed_forward_proj": "gated-gelu"},
    "t5 even": T5 | {"num_decoder_layers": None, "relative_attention_num_buckets": None},
    "mt5": MT5,
    "mt5 plain": MT5 | {"feed_forward_proj": "relu"},
    "bart": BART,
    "bart untied": BART | {"tie_word_embeddings": False},
}
BUILDERS = {
    Head.NONE: AutoModel,
    Head.LANGUAGE_MODEL: AutoModelForSeq2SeqLM,
    Head.CLASSIFICATION: AutoModelForSequenceClassification,
}
LABELS = 3


def _read(values: dict, head: Head = Head.NONE, num_labels: int = LABELS) -> ModelShape:
    return READERS[values["model_type"]](Config(values, name="given"), head, num_labels)


def _live(values: dict, head: Head, device: str = "meta") -> torch.nn.Module:
    # An absent key means the default of transformers, which its config classes refuse to be told as null.
    present = {key: value for key, value in values.items() if value is not None}
    config = AutoConfig.for_model(**present, num_labels=LABELS, decoder_start_token_id=0, eos_token_id=1)
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
    live = {
        name: (module.in_features, module.out_features, module.bias is not None)
        for name, module in _live(values, head).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert {part.name: (part.d_in, part.d_out, part.bias) for part in _read(values, head).linears()} == live


@pytest.mark.parametrize("head", list(Head))
@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_parts_come_in_the_order_in_which_they_run(values, head):
    """Row counts are checked on the way: the encoder reads 6 tokens, the decoder 4, cross-attention keys 6."""
    model, ran = _live(values, head, "cpu"), []
    shape = _read(values, head)
    named = {part.name: part for part in shape.parts if isinstance(part, Linear | Norm)}
    for name, module in model.named_modules():
        if name in named:
            module.register_forward_hook(lambda _, inputs, __, name=name: ran.append((name, inputs[0].shape)))
    source = torch.tensor([[5, 5, 5, 5, 5, 1]])
    # A classifier reads the decoder at the places where the source ends, so both must be equally long.
    target = source if head is Head.CLASSIFICATION else source[:, :4]
    with torch.no_grad():
        model(input_ids=source, decoder_input_ids=target)
    assert [name for name, _ in ran] == list(named)
    lengths = {Rows.SOURCE: 6, Rows.TOKENS: target.shape[1], Rows.HEAD: target.shape[1], Rows.SEQUENCES: 1}
    assert [shape[-2] for _, shape in ran] == [lengths[part.rows] for part in named.values()]


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_attentions_and_activations_are_named_after_live_modules(values):
    shape, modules = _read(values), dict(_live(values, Head.NONE).named_modules())
    names = [part.name for part in shape.parts if isinstance(part, Attention | Activation)]
    assert len(names) == 2 * shape.layers + len([name for name in names if "EncDec" in name or "encoder_attn" in name])
    assert set(names) <= set(modules)


@pytest.mark.parametrize("values", [T5, BART], ids=["t5", "bart"])
def test_attention_joins_the_layers_that_make_its_operands(values):
    shape = _read(values)
    linears = {linear.name: linear for linear in shape.linears()}
    found = set()
    for attention in shape.attentions():
        queries, keys, made = (linears[n] for n in (attention.queries, attention.keys, attention.values))
        assert queries.d_out == keys.d_out == made.d_out == attention.heads * attention.head_dim
        assert attention.key_heads == attention.heads
        assert (queries.rows, keys.rows, made.rows) == (attention.rows, attention.over, attention.over)
        assert not attention.rotary
        found.add((attention.rows, attention.over, attention.causal))
    assert found == {
        (Rows.SOURCE, Rows.SOURCE, False),
        (Rows.TOKENS, Rows.TOKENS, True),
        (Rows.TOKENS, Rows.SOURCE, False),
    }


def test_relative_biases_live_in_the_first_block_of_each_stack():
    tables = [part for part in _read(T5).parts if isinstance(part, Table)]
    assert tables == [
        Table("shared", 96, 24),
        Table("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", 8, 4),
        Table("decoder.block.0.layer.0.SelfAttention.relative_attention_bias", 8, 4),
    ]


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_an_activation_is_as_wide_as_what_follows_it(values):
    parts = _read(values, Head.CLASSIFICATION).parts
    pairs = [(part, after) for part, after in pairwise(parts) if isinstance(part, Activation)]
    assert pairs
    assert all((part.width, part.rows) == (after.d_in, after.rows) for part, after in pairs)


@pytest.mark.parametrize(
    ("values", "layers", "longest"), [(T5, 5, None), (MT5, 5, None), (BART, 5, 64)], ids=["t5", "mt5", "bart"]
)
def test_the_shape_says_what_the_config_says(values, layers, longest):
    shape = _read(values | {"torch_dtype": "float16"})
    assert (shape.hidden, shape.layers, shape.max_length, shape.vocabulary) == (24, layers, longest, 96)
    assert (shape.name, shape.model_type, shape.stored_bits) == ("given", values["model_type"], 16)
    assert shape.decoder
    assert shape.two_stacks
    assert list(shape.usual_targets) == USUAL_TARGETS[values["model_type"]]


def test_feed_forward_parts_are_gated_where_the_config_says_so():
    gated = {name: {p.gated for p in _read(case).parts if isinstance(p, Activation)} for name, case in CASES.items()}
    assert [name for name, kinds in gated.items() if kinds == {True}] == ["t5 gated", "mt5"]
    assert all(len(kinds) == 1 for kinds in gated.values())


def test_heads():
    (head,) = [part for part in _read(T5, Head.LANGUAGE_MODEL).linears() if part.op == "head"]
    assert head == Linear("lm_head", 24, 96, bias=False, rows=Rows.HEAD, op="head", tied_to="shared")
    (head,) = [part for part in _read(BART, Head.LANGUAGE_MODEL).linears() if part.op == "head"]
    assert head == Linear("lm_head", 24, 96, bias=False, rows=Rows.HEAD, op="head", tied_to="model.shared")
    assert [part.name for part in _read(BART, Head.CLASSIFICATION).parts[-3:]] == [
        "classification_head.dense",
        "classification_head",
        "classification_head.out_proj",
    ]
    assert not [part for part in _read(T5).linears() if part.op == "head"]


@pytest.mark.parametrize("values", [T5, MT5], ids=["t5", "mt5"])
def test_an_untied_head_has_the_weights_that_its_published_file_has(values, tmp_path):
    """Configs of T5 v1.1 and mT5 say that the head is not tied, and their files hold it beside the tokens."""
    model = _live(values, Head.LANGUAGE_MODEL, "cpu")
    model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 24))
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert base_parameters(_read(config, Head.LANGUAGE_MODEL)) == loaded.num_parameters()
    tied = base_parameters(_read(values, Head.LANGUAGE_MODEL))
    assert loaded.num_parameters() == tied + 96 * 24


@pytest.mark.parametrize(
    ("name", "parameters"), [("t5-base", 222_903_552), ("bart-base", 139_420_416), ("mt0-large", 1_229_581_312)]
)
def test_published_models_at_full_size(name, parameters):
    values = _published(name)
    sizes = _sizes(_read(values, Head.LANGUAGE_MODEL))
    assert sum(sizes.values()) == parameters
    # transformers ties the head of every mT5 that it builds from a config alone.
    built = _live_sizes(_live(values, Head.LANGUAGE_MODEL))
    assert {name: size for name, size in sizes.items() if name != "lm_head"} == built


@pytest.mark.parametrize(
    ("values", "key", "given", "message"),
    [
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
def test_what_cannot_be_counted_is_refused_with_its_key(values, key, given, message):
    with pytest.raises(ModelError, match="config of given") as caught:
        _read(values | {key: given})
    assert message in str(caught.value)
