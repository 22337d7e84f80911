"""The parts of an encoder are the modules of the live model: every one of them, by name, size and running order."""

import re

import pytest
import torch
from tiny_models import ABSOLUTE_DEBERTA, DEBERTA, ENCODERS, live
from torch import nn

from rankbits.accounting.architectures.config import Head
from rankbits.accounting.architectures.encoders import READERS
from rankbits.accounting.architectures.read import find_config, read_shape
from rankbits.accounting.params import base_parameters
from rankbits.accounting.spec import Activation, Attention, Convolution, Linear, Norm, Rows, Table
from rankbits.errors import ModelError

CONFIGS = ENCODERS | {
    "deberta-v2 with a convolution": {**DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu", "attention_head_size": 6},
    "deberta-v2 with a convolution in groups": {**DEBERTA, "conv_kernel_size": 5, "conv_groups": 2},
    "deberta-v2 with c2p of its own": {**DEBERTA, "share_att_key": False, "pos_att_type": ["c2p"]},
    "deberta-v2 with p2c alone": {**DEBERTA, "pos_att_type": "p2c", "norm_rel_ebd": "none"},
    "deberta-v2 without buckets": {**DEBERTA, "position_buckets": -1, "max_relative_positions": 9},
    "deberta-v2 with as many distances as positions": {**DEBERTA, "position_buckets": -1},
    "deberta-v2 with absolute positions": {**ABSOLUTE_DEBERTA, "type_vocab_size": 2},
}
RELATIVE = [name for name, config in CONFIGS.items() if config.get("relative_attention")]
MODULES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv1d)


def _sizes(module):
    if isinstance(module, nn.Linear):
        return ("linear", module.in_features, module.out_features, module.bias is not None)
    if isinstance(module, nn.Embedding):
        return ("table", module.num_embeddings, module.embedding_dim)
    if isinstance(module, nn.LayerNorm):
        return ("norm", *module.normalized_shape, module.bias is not None)
    return ("convolution", module.in_channels, module.out_channels, module.kernel_size, module.groups)


def _part_sizes(part):
    if isinstance(part, Linear):
        return ("linear", part.d_in, part.d_out, part.bias)
    if isinstance(part, Table):
        return ("table", part.entries, part.width)
    if isinstance(part, Norm):
        return ("norm", part.width, part.bias)
    return ("convolution", part.c_in, part.c_out, part.kernel, part.groups)


def _weighted(shape):
    return {part.name: _part_sizes(part) for part in shape.parts if not isinstance(part, Attention | Activation)}


@pytest.mark.parametrize("head", [Head.NONE, Head.CLASSIFICATION])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_module_with_weights_is_a_part_of_its_name_and_size(name, head):
    model = live(CONFIGS[name], head, labels=5)
    shape = read_shape(CONFIGS[name], name=name, head=head, num_labels=5)
    weighted = {key: _sizes(module) for key, module in model.named_modules() if isinstance(module, MODULES)}
    assert _weighted(shape) == weighted
    assert base_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("head", [Head.NONE, Head.CLASSIFICATION])
@pytest.mark.parametrize("name", CONFIGS)
def test_attentions_and_activations_are_modules_too(name, head):
    shape = read_shape(CONFIGS[name], name=name, head=head)
    modules = dict(live(CONFIGS[name], head).named_modules())
    weightless = [part.name for part in shape.parts if isinstance(part, Attention | Activation)]
    assert weightless
    assert set(weightless) <= set(modules)
    linears = {linear.name for linear in shape.linears()}
    for attention in shape.attentions():
        assert {attention.queries, attention.keys, attention.values} <= linears
        assert attention.queries.startswith(attention.name)


@pytest.mark.parametrize("head", [Head.NONE, Head.CLASSIFICATION])
@pytest.mark.parametrize("name", CONFIGS)
def test_parts_are_in_running_order(name, head):
    model, shape = live(CONFIGS[name], head), read_shape(CONFIGS[name], name=name, head=head)
    called = []
    for key, module in model.named_modules():
        if isinstance(module, MODULES):
            module.register_forward_hook(lambda *_, key=key: called.append(key))
    with torch.no_grad():
        model(torch.full((1, 6), 7))
    # A table of relative positions is read as a whole, not called; without one its norm has no rows to work on.
    idle = {
        part.name for part in shape.parts if getattr(part, "rows", None) is Rows.POSITIONS and not part.position_rows
    }
    parts = [part for part in _weighted(shape) if not part.endswith("rel_embeddings") and part not in idle]
    assert parts == list(dict.fromkeys(called))


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "camembert", "distilbert"])
def test_the_longest_text_runs_and_one_token_more_does_not(name):
    longest = read_shape(CONFIGS[name], name=name).max_length
    model = live(CONFIGS[name])
    with torch.no_grad():
        assert model(torch.full((1, longest), 7)).last_hidden_state.shape == (1, longest, 24)
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, longest + 1), 7))


def test_robertas_first_positions_belong_to_padding():
    assert read_shape(find_config("roberta-base"), name="roberta-base").max_length == 512
    assert read_shape({**CONFIGS["roberta"], "pad_token_id": 4}, name="r").max_length == 15
    with pytest.raises(ModelError, match="max_position_embeddings: given 2, expected more than 2"):
        read_shape({**CONFIGS["roberta"], "max_position_embeddings": 2}, name="r")


def test_relative_positions_set_no_limit_and_absolute_ones_do():
    assert read_shape(DEBERTA, name="d").max_length is None
    with torch.no_grad():
        assert live(DEBERTA)(torch.full((1, 33), 7)).last_hidden_state.shape == (1, 33, 24)
    config = CONFIGS["deberta-v2 with absolute positions"]
    assert read_shape(config, name="d").max_length == 20
    with pytest.raises(RuntimeError), torch.no_grad():
        live(config)(torch.full((1, 21), 7))


@pytest.mark.parametrize("name", RELATIVE)
def test_all_rows_of_the_position_table_are_projected(name):
    shape, model = read_shape(CONFIGS[name], name=name), live(CONFIGS[name])
    rows = model.encoder.rel_embeddings.num_embeddings
    projected = set()
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, args, __, key=key: projected.add(key) if args[0].shape[:2] == (1, rows) else None
            )
    with torch.no_grad():
        model(torch.full((2, 5), 7))
    assert {linear.name: linear.position_rows for linear in shape.linears() if linear.position_rows} == dict.fromkeys(
        projected, rows
    )
    assert {attention.position_rows for attention in shape.attentions()} == {rows}


def _compared(name):
    return {(part.c2p, part.p2c) for part in read_shape(CONFIGS[name], name=name).attentions()}


def test_comparisons_with_positions_are_those_of_the_config():
    assert _compared("deberta-v3") == {(True, True)}
    assert _compared("deberta-v2 with c2p of its own") == {(True, False)}
    assert _compared("deberta-v2 with p2c alone") == {(False, True)}
    assert _compared("deberta-v2 with absolute positions") == _compared("bert") == {(False, False)}


def _projections(config):
    linears = read_shape(config, name="d").linears()
    return {part.name.rpartition(".")[2]: (part.rows, part.position_op) for part in linears if part.position_rows}


def test_products_of_position_rows_are_called_by_what_they_make():
    assert _projections(DEBERTA) == {
        "query_proj": (Rows.TOKENS, "pos_query"),
        "key_proj": (Rows.TOKENS, "pos_key"),
    }
    assert _projections(CONFIGS["deberta-v2 with projections for positions"]) == {
        "pos_key_proj": (Rows.POSITIONS, "pos_key"),
        "pos_query_proj": (Rows.POSITIONS, "pos_query"),
    }


def test_names_in_lists_may_be_written_as_transformers_reads_them():
    config = {**DEBERTA, "pos_att_type": "P2C | c2p", "norm_rel_ebd": "None | Layer_Norm"}
    assert read_shape(config, name="d").parts == read_shape(DEBERTA, name="d").parts


def test_heads_and_poolers_see_one_row_per_sequence():
    for name, expected in {
        "bert": ["bert.pooler.dense", "bert.pooler.activation", "classifier"],
        "roberta": ["classifier.dense", "classifier", "classifier.out_proj"],
        "deberta-v3": ["pooler.dense", "pooler", "classifier"],
        "distilbert": ["pre_classifier", "pre_classifier", "classifier"],
    }.items():
        shape = read_shape(CONFIGS[name], name=name, head=Head.CLASSIFICATION)
        once = [part.name for part in shape.parts if getattr(part, "rows", None) is Rows.SEQUENCES]
        assert once == expected


def test_the_norm_of_relative_positions_works_on_their_rows():
    norms = {part.name: part for part in read_shape(DEBERTA, name="d").parts if isinstance(part, Norm)}
    assert norms["encoder.LayerNorm"].rows is Rows.POSITIONS
    assert norms["encoder.LayerNorm"].position_rows == 16
    assert norms["embeddings.LayerNorm"].rows is Rows.TOKENS


def test_the_convolution_runs_once_on_every_token():
    name = "deberta-v2 with a convolution in groups"
    (found,) = [part for part in read_shape(CONFIGS[name], name=name).parts if isinstance(part, Convolution)]
    assert found == Convolution("encoder.conv.conv", 24, 24, (5,), positions=0, groups=2)


def test_the_shape_says_what_a_report_needs():
    shape = read_shape(find_config("deberta-v3-base"), name="mine", head=Head.CLASSIFICATION)
    assert (shape.name, shape.model_type, shape.hidden, shape.layers) == ("mine", "deberta-v2", 768, 12)
    assert (shape.vocabulary, shape.stored_bits, shape.decoder, shape.two_stacks) == (128_100, 32, False, False)
    assert shape.usual_targets == ("query_proj", "value_proj")
    attention = shape.attentions()[0]
    assert (attention.heads, attention.key_heads, attention.head_dim, attention.position_rows) == (12, 12, 64, 512)
    assert not attention.causal
    assert read_shape(CONFIGS["bert"], name="b").usual_targets == ("query", "value")
    assert read_shape({**CONFIGS["bert"], "torch_dtype": "float16"}, name="b").stored_bits == 16
    small = read_shape({**CONFIGS["distilbert"], "dtype": "bfloat16"}, name="b")
    assert (small.usual_targets, small.stored_bits, small.hidden, small.layers) == (("q_lin", "v_lin"), 16, 24, 2)


def test_deberta_v3_base_by_groups():
    """184,423,682 parameters: 98,380,800 word embeddings, 85,449,216 encoder and its table, the rest around them."""
    shape = read_shape(find_config("deberta-v3-base"), name="d", head=Head.CLASSIFICATION)
    tables = {part.name: part.entries * part.width for part in shape.parts if isinstance(part, Table)}
    assert tables == {"deberta.embeddings.word_embeddings": 98_380_800, "deberta.encoder.rel_embeddings": 393_216}
    linears = sum(linear.d_in * linear.d_out + linear.d_out for linear in shape.linears())
    norms = sum(2 * part.width for part in shape.parts if isinstance(part, Norm))
    assert linears + norms + 98_380_800 + 393_216 == 184_423_682


@pytest.mark.parametrize("name", CONFIGS)
def test_a_masked_word_head_is_refused(name):
    kind = CONFIGS[name]["model_type"]
    with pytest.raises(ModelError, match=f"model_type: given '{kind}' for a language-model head, expected a decoder"):
        read_shape(CONFIGS[name], name=name, head=Head.LANGUAGE_MODEL)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_of_a_live_model_reads_as_the_file_does(name):
    assert read_shape(live(CONFIGS[name]).config.to_dict(), name="m") == read_shape(CONFIGS[name], name="m")


SIZES = {
    "bert": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
    "roberta": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
    "deberta-v3": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
    "distilbert": ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size"),
}


@pytest.mark.parametrize("value", [0, -4, None, "24"])
@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in SIZES.items() for key in keys])
def test_every_size_is_checked(name, key, value):
    given = re.escape(repr(value))
    with pytest.raises(ModelError, match=f"config of mine: {key}: given {given}, expected a whole number of at least"):
        read_shape({**CONFIGS[name], key: value}, name="mine")


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("bert", {"num_attention_heads": 5}, "expected a divisor of hidden_size, which is 24"),
        ("bert", {"is_decoder": True}, "is_decoder: given True, expected false: it is counted as an encoder"),
        ("roberta", {"add_cross_attention": True}, "add_cross_attention: given True, expected false"),
        ("bert", {"position_embedding_type": "relative_key"}, "expected absolute: relative keys are not counted"),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size: given 0, expected a whole number of at least 1"),
        ("bert", {"max_position_embeddings": -1}, "max_position_embeddings: given -1"),
        ("distilbert", {"n_heads": 5}, "n_heads: given 5, expected a divisor of dim, which is 24"),
        ("deberta-v3", {"attention_head_size": 8}, "divided by num_attention_heads, which is 6"),
        ("deberta-v3", {"pooler_hidden_size": 8}, "pooler_hidden_size: given 8, expected hidden_size, which is 24"),
        ("deberta-v3", {"pos_att_type": "p2c|p2p"}, "pos_att_type: given 'p2c|p2p', expected c2p, p2c or both"),
        ("deberta-v3", {"position_buckets": -2}, "position_buckets: given -2, expected a whole number of at least -1"),
        ("deberta-v3", {"conv_kernel_size": 4}, "conv_kernel_size: given 4, expected an odd number"),
        ("deberta-v3", {"conv_kernel_size": 3, "conv_groups": 5}, "conv_groups: given 5, expected a divisor of hidden"),
        ("deberta-v3", {"share_att_key": "yes"}, "share_att_key: given 'yes', expected true or false"),
    ],
)
def test_what_would_be_counted_wrongly_is_refused(name, wrong, expected):
    with pytest.raises(ModelError, match=re.escape(expected)):
        read_shape({**CONFIGS[name], **wrong}, name="mine")


def test_every_reader_is_tried_here():
    assert {config["model_type"] for config in CONFIGS.values()} == set(READERS)
