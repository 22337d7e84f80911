"""Models of two stacks, read from their configs, have the parts, names, sizes and order of the live models."""

import json

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS
from tiny_models import BART, MT5, T5, TWO_STACKS, live, read
from transformers import AutoModelForSeq2SeqLM

from rankbits.accounting.architectures.config import Head
from rankbits.accounting.params import base_parameters
from rankbits.accounting.spec import Activation, Attention, Linear, Norm, Rows, Table


@pytest.mark.parametrize("head", list(Head))
@pytest.mark.parametrize("values", TWO_STACKS.values(), ids=TWO_STACKS)
def test_parts_come_in_the_order_in_which_they_run(values, head):
    """Row counts are checked on the way: the encoder reads 6 tokens, the decoder 4, cross-attention keys 6."""
    model, ran = live(values, head), []
    shape = read(values, head)
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


@pytest.mark.parametrize("values", TWO_STACKS.values(), ids=TWO_STACKS)
def test_attentions_and_activations_are_named_after_live_modules(values):
    shape, modules = read(values), dict(live(values, device="meta").named_modules())
    names = [part.name for part in shape.parts if isinstance(part, Attention | Activation)]
    assert len(names) == 2 * shape.layers + len([name for name in names if "EncDec" in name or "encoder_attn" in name])
    assert set(names) <= set(modules)


@pytest.mark.parametrize("values", [T5, BART], ids=["t5", "bart"])
def test_attention_joins_the_layers_that_make_its_operands(values):
    shape = read(values)
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
    tables = [part for part in read(T5).parts if isinstance(part, Table)]
    assert tables == [
        Table("shared", 96, 24),
        Table("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", 8, 4),
        Table("decoder.block.0.layer.0.SelfAttention.relative_attention_bias", 8, 4),
    ]


@pytest.mark.parametrize(
    ("values", "layers", "longest"), [(T5, 5, None), (MT5, 5, None), (BART, 5, 64)], ids=["t5", "mt5", "bart"]
)
def test_the_shape_says_what_the_config_says(values, layers, longest):
    shape = read(values | {"torch_dtype": "float16"})
    assert (shape.hidden, shape.layers, shape.max_length, shape.vocabulary) == (24, layers, longest, 96)
    assert (shape.name, shape.model_type, shape.stored_bits) == ("given", values["model_type"], 16)
    assert shape.decoder
    assert shape.two_stacks
    assert list(shape.usual_targets) == USUAL_TARGETS[values["model_type"]]


def test_feed_forward_parts_are_gated_where_the_config_says_so():
    gated = {
        name: {p.gated for p in read(case).parts if isinstance(p, Activation)} for name, case in TWO_STACKS.items()
    }
    assert [name for name, kinds in gated.items() if kinds == {True}] == ["t5 gated", "mt5"]
    assert all(len(kinds) == 1 for kinds in gated.values())


def test_heads():
    (head,) = [part for part in read(T5, Head.LANGUAGE_MODEL).linears() if part.op == "head"]
    assert head == Linear("lm_head", 24, 96, bias=False, rows=Rows.HEAD, op="head", tied_to="shared")
    (head,) = [part for part in read(BART, Head.LANGUAGE_MODEL).linears() if part.op == "head"]
    assert head == Linear("lm_head", 24, 96, bias=False, rows=Rows.HEAD, op="head", tied_to="model.shared")
    assert [part.name for part in read(BART, Head.CLASSIFICATION).parts[-3:]] == [
        "classification_head.dense",
        "classification_head",
        "classification_head.out_proj",
    ]
    assert not [part for part in read(T5).linears() if part.op == "head"]


@pytest.mark.parametrize("values", [T5, MT5], ids=["t5", "mt5"])
def test_an_untied_head_has_the_weights_that_its_published_file_has(values, tmp_path):
    """Configs of T5 v1.1 and mT5 say that the head is not tied, and their files hold it beside the tokens."""
    model = live(values, Head.LANGUAGE_MODEL)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 24))
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert base_parameters(read(config, Head.LANGUAGE_MODEL)) == loaded.num_parameters()
    tied = base_parameters(read(values, Head.LANGUAGE_MODEL))
    assert loaded.num_parameters() == tied + 96 * 24
