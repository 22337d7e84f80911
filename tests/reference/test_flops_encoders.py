"""Products of encoders, predicted from the config alone, are what PyTorch's FlopCounterMode then counts: no MAC off."""

import counting
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import ABSOLUTE_DEBERTA, BERT, DEBERTA, ENCODERS, live, read

from rankbits.accounting.architectures.config import Head
from rankbits.accounting.architectures.read import find_config, read_shape
from rankbits.accounting.macs import products
from rankbits.accounting.params import count
from rankbits.accounting.spec import Method, MethodSpec
from rankbits.records import CountOptions

CASES = ENCODERS | {
    "minilm": {**BERT, "model_type": "bert", "hidden_size": 12, "num_attention_heads": 6, "intermediate_size": 48},
    "deberta-v2": {**DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu"},
    "deberta-v2 in groups": {**DEBERTA, "conv_kernel_size": 5, "conv_groups": 3},
    "deberta-v2 with c2p alone": {**DEBERTA, "pos_att_type": "c2p"},
    "deberta-v2 with p2c of its own": {**DEBERTA, "pos_att_type": "p2c", "share_att_key": False},
    "deberta-v2 without buckets": {**DEBERTA, "position_buckets": -1},
    "deberta-v2 with absolute positions": ABSOLUTE_DEBERTA,
}
SMALL = {name: config | {"max_position_embeddings": 40} for name, config in CASES.items()}
ADAPTED = [
    "minilm",
    "bert",
    "roberta",
    "distilbert",
    "deberta-v3",
    "deberta-v2",
    "deberta-v2 with projections for positions",
]
BATCHES = [(1, 1), (1, 7), (1, 38), (3, 13)]
FULL = ["minilm-l6", "bert-base", "roberta-base", "deberta-v3-base"]
TARGETS = {
    "bert": ("query", "key", "value"),
    "roberta": ("query", "key", "value"),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj"),
}
D, E = 768, 512
"""Hidden size and position rows of DeBERTaV3-base."""


# PEFT asks for it by its older name whenever it wraps a model of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def _options(batch, tokens, **others):
    return {"query_len": tokens, "key_len": tokens, "batch": batch, **others}


def _predicted(config, options, *, head=Head.NONE, spec=None):
    return counting.predicted(config, spec, top=head, **options)


def _pass(model, batch, tokens):
    """One forward pass, to be run and counted."""
    device = next(model.parameters()).device
    inputs = {"input_ids": torch.full((batch, tokens), 7, device=device)}
    if model.config.model_type == "deberta-v2":
        # Without a mask it looks for padding among the tokens, which have no values on the meta device.
        inputs["attention_mask"] = torch.ones(batch, tokens, device=device)
    return lambda: model(**inputs)


def _counted(model, batch, tokens):
    return counting.counted(_pass(model, batch, tokens))


@pytest.mark.parametrize("head", [Head.NONE, Head.CLASSIFICATION])
@pytest.mark.parametrize("name", SMALL)
def test_small_encoders_run_the_predicted_products(name, head):
    predicted = {sizes: _predicted(SMALL[name], _options(*sizes), head=head) for sizes in BATCHES}
    model = live(SMALL[name], head=head)
    assert {sizes: _counted(model, *sizes) for sizes in BATCHES} == predicted


@pytest.mark.parametrize("name", FULL)
def test_full_size_encoders_run_the_predicted_products(name):
    config, head = find_config(name), Head.CLASSIFICATION
    predicted = {sizes: _predicted(config, _options(*sizes), head=head) for sizes in [(1, 20), (8, 512)]}
    model = live(config, head=head, device="meta")
    assert {sizes: _counted(model, *sizes) for sizes in predicted} == predicted


@pytest.mark.parametrize("name", SMALL)
def test_every_product_belongs_to_the_module_that_runs_it(name):
    listed = products(read(SMALL[name], Head.CLASSIFICATION), CountOptions(**_options(2, 9)))
    modules = {product.module for product in listed}
    # To the counter a module's work is that of the modules inside it too: q, k and v are inside their attention.
    predicted = {
        module: sum(product.macs for product in listed if f"{product.module}.".startswith(f"{module}."))
        for module in modules
    }
    model = live(SMALL[name], head=Head.CLASSIFICATION)
    flops = counting.counter_after(_pass(model, 2, 9)).get_flop_counts()
    assert {module: sum(flops[f"{type(model).__name__}.{module}"].values()) // 2 for module in modules} == predicted


@pytest.mark.parametrize(("rank", "targets"), [(2, "qkv"), (8, "qkv"), (8, "all-linear")])
@pytest.mark.parametrize("name", ADAPTED)
def test_lora_beside_its_layers_adds_what_was_predicted_and_nothing_once_merged(name, rank, targets):
    config = SMALL[name]
    names = TARGETS[config["model_type"]] if targets == "qkv" else targets
    spec = MethodSpec(Method.LORA, rank=rank, targets=names)
    sizes = (3, 11)
    base = _predicted(config, _options(*sizes))
    unmerged = _predicted(config, _options(*sizes, adapters="unmerged"), spec=spec)
    merged = _predicted(config, _options(*sizes), spec=spec)
    adapters = count(read_shape(config, name=name), spec).trainable

    settings = LoraConfig(r=rank, target_modules=names if isinstance(names, str) else list(names))
    model = get_peft_model(live(config), settings).eval()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapters
    assert _counted(model, *sizes) == unmerged > base
    assert _counted(model.merge_and_unload(), *sizes) == merged == base


def _one_layer():
    return {**find_config("deberta-v3-base"), "num_hidden_layers": 1}


def _attention(batch, tokens, **others):
    shape = read_shape(_one_layer(), name="one layer")
    listed = products(shape, CountOptions(**_options(batch, tokens, **others)))
    return sum(product.macs for product in listed if product.module.startswith("encoder.layer.0.attention.self"))


@pytest.mark.parametrize(
    ("tokens", "attention", "layer"),
    [
        (20, 655_712_256, 761_880_576),
        (64, 773_849_088, 1_113_587_712),
        (128, 956_301_312, 1_635_778_560),
        (256, 1_358_954_496, 2_717_908_992),
    ],
)
def test_one_layer_of_deberta_v3_base(tokens, attention, layer):
    """Attention: 3Td^2 + 2T^2d + 2Ted + 2ed^2; the rest of the layer: 9Td^2 (Bayesian-LoRA, App. D)."""
    assert attention == 3 * tokens * D**2 + 2 * tokens**2 * D + 2 * tokens * E * D + 2 * E * D**2
    assert _attention(1, tokens) == attention
    assert _predicted(_one_layer(), _options(1, tokens)) == layer == attention + 9 * D**2 * tokens
    assert _counted(live(_one_layer(), device="meta"), 1, tokens) == layer


@pytest.mark.parametrize(
    ("batch", "tokens", "attention"), [(1, 20, 655_712_256), (4, 20, 810_909_696), (8, 128, 3_422_552_064)]
)
def test_position_rows_are_projected_once_per_batch_and_not_at_all_once_cached(batch, tokens, attention):
    assert _attention(batch, tokens) == attention
    assert _attention(batch, tokens, positions="cached") == attention - 2 * E * D**2


@pytest.mark.parametrize(("rank", "added"), [(2, 3_330_048), (8, 13_320_192), (16, 26_640_384)])
def test_lora_on_q_k_v_of_one_layer_of_deberta_v3_base(rank, added):
    """2rd(3T + 2e): query and key project the position rows too."""
    spec = MethodSpec(Method.LORA, rank=rank, targets=TARGETS["deberta-v2"])
    base = _predicted(_one_layer(), _options(1, 20))
    unmerged = _predicted(_one_layer(), _options(1, 20, adapters="unmerged"), spec=spec)
    assert unmerged - base == added == 2 * rank * D * (3 * 20 + 2 * E)
    with torch.device("meta"):
        model = get_peft_model(
            live(_one_layer(), device="meta"), LoraConfig(r=rank, target_modules=list(spec.targets))
        ).eval()
    assert _counted(model, 1, 20) == unmerged


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "deberta-v2", "deberta-v3"])
def test_real_lengths_cost_what_each_text_costs_alone(name):
    lengths = [4, 11, 4]
    predicted = _predicted(SMALL[name], _options(3, 11, lengths=lengths), head=Head.CLASSIFICATION)
    shape = read_shape(SMALL[name], name=name)
    shared = sum(linear.position_rows * linear.d_in * linear.d_out for linear in shape.linears())
    model = live(SMALL[name], head=Head.CLASSIFICATION)
    alone = sum(_counted(model, 1, length) for length in lengths)
    # Position rows are projected once for the batch, and three times for three texts alone.
    assert predicted == alone - 2 * shared < _predicted(SMALL[name], _options(3, 11), head=Head.CLASSIFICATION)
