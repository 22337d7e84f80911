"""Which quantizers and gates belong to which layer, as the tuner attaches them, and how many ranges a weight has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from peft import get_peft_model
from tiny_models import sizes
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    LlamaConfig,
    PhiConfig,
    T5Config,
)

from rankbits.accounting import quantizers
from rankbits.accounting.architectures.read import Head, read_shape
from rankbits.accounting.params import check_attention, count, targeted
from rankbits.accounting.quantizers import Owned, kept_activations, owned, range_shape, ranges, sites_of
from rankbits.accounting.spec import Granularity, Linear, Method, MethodSpec, ModelShape, Placement
from rankbits.errors import ModelError
from rankbits.tuners.bayesian_lora import BayesianLoraConfig, adapted_layers, siblings

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SMALL = sizes(hidden=32, layers=2, heads=4, wide=48, words=50)
DEBERTA = {"relative_attention": True, "position_buckets": 8, "share_att_key": True, "pos_att_type": ["c2p", "p2c"]}
T5 = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
BART = BartConfig(
    vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, max_position_embeddings=40,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
)  # fmt: skip
MODELS: dict[str, tuple[Any, Any, Head]] = {
    "bert": (AutoModelForSequenceClassification, BertConfig(**SMALL), Head.CLASSIFICATION),
    "deberta": (
        AutoModelForSequenceClassification,
        DebertaV2Config(**SMALL, **DEBERTA, norm_rel_ebd="layer_norm"),
        Head.CLASSIFICATION,
    ),
    "llama": (AutoModelForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2), Head.LANGUAGE_MODEL),
    "phi": (AutoModelForCausalLM, PhiConfig(**SMALL), Head.LANGUAGE_MODEL),
    "t5": (AutoModelForSeq2SeqLM, T5, Head.LANGUAGE_MODEL),
    "bart": (AutoModel, BART, Head.NONE),
}
SITES = ("weight", "down", "up", "output", "input")
SHARED = MethodSpec(Method.BAYESIAN_LORA, sites=SITES, targets="all-linear")


def _attached(name: str, spec: MethodSpec, **settings: Any) -> tuple[nn.Module, ModelShape]:
    auto, config, head = MODELS[name]
    chosen: dict[str, Any] = {
        "r": spec.rank,
        "task_type": "SEQ_CLS" if head is Head.CLASSIFICATION else None,
        "target_modules": spec.targets,
        "quantizers": list(spec.sites),
        "placement": spec.placement.value,
        "granularity": spec.granularity.value,
        "input_granularity": spec.input_granularity.value,
        "group_size": spec.group_size,
        "share_inputs": spec.share_inputs,
        "tie_groups": "fused" if spec.tie_groups else None,
        "quantize_attention": spec.quantize_attention,
    }
    model = get_peft_model(auto.from_config(config), BayesianLoraConfig(**(chosen | settings)))
    return model, read_shape(config.to_dict(), name=name, head=head)


def test_the_groups_are_those_of_the_tuner() -> None:
    assert quantizers.PROJECTIONS == siblings.PROJECTIONS
    assert quantizers.READERS_OF_ONE_TENSOR == siblings.READERS_OF_ONE_TENSOR
    assert (quantizers.QUERIES, quantizers.CROSS_ATTENTION) == (siblings.QUERIES, siblings.CROSS_ATTENTION)


@pytest.mark.parametrize("tied", [False, True], ids=["own-widths", "tied-widths"])
@pytest.mark.parametrize("shared", [False, True], ids=["own-inputs", "shared-inputs"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_own_what_the_live_layers_own(name: str, shared: bool, tied: bool) -> None:
    spec = replace(SHARED, share_inputs=shared, tie_groups=tied)
    model, shape = _attached(name, spec)
    found = owned(targeted(shape, spec), spec)
    live = {
        key.removeprefix("base_model.model."): Owned(
            tuple(site.value for site in layer.sites_of("default")),
            tuple(site.value for site in layer.rows_of("default")),
        )
        for key, layer in adapted_layers(model)
    }
    # BART defines keys before queries, so another of the three comes first there; how many there are is the same.
    if name == "bart":
        assert sorted(map(str, found.values())) == sorted(map(str, live.values()))
    else:
        assert found == live


@pytest.mark.parametrize("targets", ["all-linear", ("query", "key", "value", "q_proj", "v_proj", "q", "v", "k")])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
def test_layers_of_a_quantized_attention_own_what_the_live_layers_own(name: str, targets: Any) -> None:
    own = {"bert": targets[:3], "llama": targets[3:5], "t5": targets[5:], "bart": targets[3:5]}[name]
    chosen: Any = targets if targets == "all-linear" else own
    spec = replace(SHARED, sites=("weight", "input"), targets=chosen, quantize_attention=True)
    if targets != "all-linear" and name in {"llama", "bart"}:
        shape = read_shape(MODELS[name][1].to_dict(), name=name, head=MODELS[name][2])
        with pytest.raises(ModelError, match=f"no attention of {name} has its queries, keys and values all adapted"):
            check_attention(shape, spec)
        assert not any("output" in sites for sites in sites_of(targeted(shape, spec), spec).values())
        return
    given = chosen if isinstance(chosen, str) else list(chosen)
    model, shape = _attached(name, spec, target_modules=given)
    check_attention(shape, spec)
    found = owned(targeted(shape, spec), spec)
    live = {
        key.removeprefix("base_model.model."): tuple(site.value for site in layer.sites_of("default"))
        for key, layer in adapted_layers(model)
    }
    assert sum("probabilities" in sites for sites in live.values()) >= 2
    assert sorted(str(own.quantizers) for own in found.values()) == sorted(map(str, live.values()))
    with_probabilities = {name for name, sites in live.items() if "probabilities" in sites}
    assert with_probabilities == {name for name, own in found.items() if "probabilities" in own.quantizers}


def test_attention_that_compares_positions_apart_cannot_be_quantized() -> None:
    shape = read_shape(MODELS["deberta"][1].to_dict(), name="deberta", head=Head.CLASSIFICATION)
    spec = replace(SHARED, quantize_attention=True)
    with pytest.raises(ModelError, match=r"encoder.layer.0.attention.self of deberta compares positions"):
        check_attention(shape, spec)
    check_attention(shape, replace(spec, method=Method.LORA))


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_groups": True},
        {"share_inputs": False},
        {"quantize_attention": True, "sites": ("weight", "input")},
        {"placement": Placement.MERGED, "sites": ("weight", "input", "output")},
        {"input_granularity": Granularity.GROUP},
    ],
    ids=["shared", "tied", "own", "attention", "merged", "inputs in groups"],
)
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_trained_parameters_are_those_of_the_live_model(
    name: str, changes: dict[str, Any], granularity: Granularity
) -> None:
    if "input_granularity" in changes:
        granularity = Granularity.GROUP
    spec = replace(SHARED, granularity=granularity, group_size=16, rank=3, **changes)
    model, shape = _attached(name, spec)
    live: dict[str, int] = {"gates": 0, "ranges": 0, "adapter": 0}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and ".modules_to_save." not in parameter_name:
            in_gates, in_ranges = "_gates." in parameter_name, "_quantizers." in parameter_name
            live["gates" if in_gates else "ranges" if in_ranges else "adapter"] += parameter.numel()
    found = count(shape, spec)
    assert {"gates": found.gates, "ranges": found.ranges, "adapter": found.adapter + found.diagonal} == live


LAYER = Linear("block.q", 24, 10)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [(Granularity.TENSOR, (1,)), (Granularity.CHANNEL, (10, 1)), (Granularity.GROUP, (10, 3, 1))],
)
def test_a_weight_has_as_many_ranges_as_it_has_parts(granularity: Granularity, shape: tuple[int, ...]) -> None:
    spec = replace(SHARED, granularity=granularity, group_size=8)
    assert range_shape(LAYER, "weight", spec) == shape
    assert [ranges(LAYER, site, spec) for site in ("up", "input")] == [1, 1]


def test_inputs_in_groups_have_a_range_for_each_whatever_the_rows() -> None:
    spec = replace(SHARED, granularity=Granularity.GROUP, input_granularity=Granularity.GROUP, group_size=8)
    assert range_shape(LAYER, "input", spec) == (3, 1)
    assert [ranges(LAYER, site, spec) for site in ("weight", "input", "output")] == [30, 3, 1]


@pytest.mark.parametrize("size", [7, 0, 48])
def test_groups_that_do_not_divide_the_inputs_are_refused(size: int) -> None:
    spec = replace(SHARED, granularity=Granularity.GROUP, group_size=size)
    with pytest.raises(ModelError, match=rf"group_size: given {size} for block.q, expected a divisor of its 24 inputs"):
        ranges(LAYER, "weight", spec)


def test_only_learned_sites_of_its_own_are_kept() -> None:
    own = Owned(("weight", "output", "input"), ("weight", "output", "input"))
    assert list(kept_activations(LAYER, own, SHARED)) == ["output", "input"]
    learned = replace(SHARED, widths={"block.q": {"weight": 4, "input": 8}})
    assert list(kept_activations(LAYER, own, learned)) == ["input"]
