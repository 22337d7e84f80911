"""The live count of models whose quantizer rounds the sum of weight and update: as merged, as trained, as predicted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_models import sizes
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rankbits import BayesianLoraConfig, GateSchedule, harden
from rankbits.accounting.architectures.read import Head, read_shape
from rankbits.accounting.measure import cost
from rankbits.accounting.predict import predict
from rankbits.accounting.spec import Granularity, Method, MethodSpec, Placement
from rankbits.records import CostRecord, WeightRecord
from rankbits.tuners.bayesian_lora import adapted_layers, summarize
from rankbits.tuners.bayesian_lora.config import Site

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BATCH, TOKENS, RANK = 2, 6, 3
SMALL = sizes(hidden=32, layers=2, heads=4, wide=48, words=60)
DEBERTA = {"relative_attention": True, "position_buckets": 8, "share_att_key": True, "pos_att_type": ["c2p", "p2c"]}
T5 = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
MODELS: dict[str, tuple[Any, Any, Head, tuple[str, ...]]] = {
    "bert": (
        BertForSequenceClassification,
        BertConfig(**SMALL),
        Head.CLASSIFICATION,
        ("query", "key", "intermediate.dense"),
    ),
    "deberta": (
        DebertaV2ForSequenceClassification,
        DebertaV2Config(**SMALL, **DEBERTA, norm_rel_ebd="layer_norm", type_vocab_size=0),
        Head.CLASSIFICATION,
        ("query_proj", "key_proj", "value_proj"),
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(**SMALL, num_key_value_heads=2),
        Head.LANGUAGE_MODEL,
        ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "t5": (T5ForConditionalGeneration, T5, Head.LANGUAGE_MODEL, ("q", "k", "wi")),
}
ATTENTION = {"bert": ("query", "key", "value"), "llama": ("q_proj", "k_proj", "v_proj"), "t5": ("q", "k", "v")}
SITES = ("weight", "output", "input")
GATED = (4, 8, 16, 32)
COUNTED = {"sequence_length": TOKENS, "batch": BATCH}


@torch.no_grad()
def _learned(name: str, spec: MethodSpec) -> Any:
    """A model that has learned a width for each site that differs from layer to layer, and rank 3 of 4."""
    model_class, config, _, _ = MODELS[name]
    torch.manual_seed(0)
    settings = BayesianLoraConfig(
        r=4,
        target_modules=list(spec.targets or ()),
        quantizers=list(spec.sites),
        placement=spec.placement.value,
        granularity=spec.granularity.value,
        group_size=spec.group_size,
        quantize_attention=spec.quantize_attention,
        calibration_passes=1,
        init_weights=False,
    )
    model = get_peft_model(model_class(config), settings)
    GateSchedule(model, 10).step()
    ids = torch.arange(1, 1 + 3 * TOKENS).reshape(3, TOKENS)
    model.train()(**({"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})))
    for index, (_, layer) in enumerate(adapted_layers(model)):
        layer.finish_calibration("default")
        gates = layer.gates_of("default")
        for row in range(len(layer.rows_of("default"))):
            width = (4, 8, 2, 16)[(index + row) % 4]
            gates.bit_logits[row] = torch.tensor([6.0 if gated <= width else -6.0 for gated in GATED])
        gates.rank_logits.fill_(-9.0)
        gates.rank_logits[: RANK - 1] = 9.0
    return model


def _spec(name: str, placement: Placement = Placement.MERGED, **changes: Any) -> MethodSpec:
    sites = SITES if placement is Placement.MERGED else ("weight", "down", "up", "input")
    return MethodSpec(
        Method.BAYESIAN_LORA,
        rank=4,
        targets=MODELS[name][3],
        sites=sites,
        placement=placement,
        group_size=16,
        **changes,
    )


def _as_learned(model: Any, spec: MethodSpec) -> MethodSpec:
    entries = {entry.name.removeprefix("base_model.model."): entry for entry in summarize(model)}
    ranks = {key: entry.rank for key, entry in entries.items()}
    return replace(spec, ranks=ranks, widths={key: entry.bits for key, entry in entries.items()})


def _predicted(name: str, record: CostRecord, spec: MethodSpec) -> CostRecord:
    _, config, head, _ = MODELS[name]
    return predict(read_shape(config.to_dict(), name=name, head=head), record.options, spec)


def _products(record: CostRecord) -> Counter[tuple[Any, ...]]:
    """What both counts must agree on; operands may be either way round, and a live count calls a classifier a head."""
    return Counter(
        (
            product.module,
            "linear" if product.op == "head" else product.op,
            product.macs,
            product.constant,
            product.adapter,
            *sorted([(product.left, product.bits_left), (product.right, product.bits_right)]),
        )
        for product in record.products
    )


def _weights(record: CostRecord) -> Counter[tuple[Any, ...]]:
    adapted = [w for w in record.weights if w.operand in {"W0", "A", "B", "E", "ranges"}]
    return Counter((w.module, w.operand, w.elements, w.bits, w.scales, w.adapter) for w in adapted)


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("name", MODELS)
def test_it_counts_as_its_merged_form_by_itself(name: str, granularity: Granularity) -> None:
    spec = _spec(name, granularity=granularity)
    model = _learned(name, spec)
    record = cost(model, **COUNTED)
    assert record.options.adapters == "merged"
    expected = _predicted(name, record, _as_learned(model, spec))
    assert _products(record) == _products(expected)
    assert _weights(record) == _weights(expected)
    assert record.macs == record.reference_macs == expected.reference_macs
    assert record.adapter_share == 0
    assert {w.operand for w in record.weights} & {"A", "B", "E"} == set()


@pytest.mark.parametrize("name", MODELS)
def test_as_it_trains_the_update_is_a_product_of_its_own(name: str) -> None:
    spec = _spec(name, granularity=Granularity.CHANNEL)
    model = _learned(name, spec)
    record = cost(model, **COUNTED, adapters="unmerged")
    expected = _predicted(name, record, _as_learned(model, spec))
    assert _products(record) == _products(expected)
    assert _weights(record) == _weights(expected)
    forming = [p for p in record.products if p.op == "lora_merge"]
    layers = {key.removeprefix("base_model.model."): layer for key, layer in adapted_layers(model)}
    assert {p.module for p in forming} == set(layers)
    for product in forming:
        layer = layers[product.module]
        assert product.macs == RANK * layer.in_features * layer.out_features, "whatever the number of tokens"


@pytest.mark.parametrize("form", ["as it is", "hardened", "merged"])
@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("name", ATTENTION)
def test_both_operands_of_a_quantized_attention_have_their_widths(name: str, placement: Placement, form: str) -> None:
    spec = _spec(name, placement, quantize_attention=True)
    spec = replace(spec, targets=ATTENTION[name], sites=tuple(site for site in spec.sites if site != "output"))
    model = _learned(name, spec)
    learned = _as_learned(model, spec)
    if form == "hardened":
        harden(model)
    if form == "merged" and placement is Placement.MERGED:
        model.merge_adapter()
    record = cost(model, **COUNTED)
    expected = _predicted(name, record, learned)
    assert _products(record) == _products(expected)
    assert _weights(record) == _weights(expected)
    attended = [product for product in record.products if product.op in {"scores", "context"}]
    assert len(attended) == {"bert": 4, "llama": 4, "t5": 6}[name]
    assert all(product.bits_left <= 16 and product.bits_right <= 16 for product in attended)


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_update_beside_a_weight_with_fine_ranges(name: str, granularity: Granularity) -> None:
    spec = _spec(name, Placement.SEPARATE, granularity=granularity)
    model = _learned(name, spec)
    record = cost(model, **COUNTED)
    assert record.options.adapters == "unmerged"
    expected = _predicted(name, record, _as_learned(model, spec))
    assert _products(record) == _products(expected)
    assert _weights(record) == _weights(expected)


def test_merging_hardening_and_running_before_change_nothing_of_the_count() -> None:
    model = _learned("bert", _spec("bert"))
    counted = cost(model, **COUNTED)
    with torch.no_grad():
        model.eval()(input_ids=torch.ones(1, TOKENS, dtype=torch.long))
    assert cost(model, **COUNTED) == counted
    harden(model)
    hardened = cost(model, **COUNTED)
    assert (hardened.products, hardened.weights) == (counted.products, counted.weights)
    model.merge_adapter()
    merged = cost(model, **COUNTED)
    assert (merged.products, merged.weights) == (counted.products, counted.weights)
    model.unmerge_adapter()
    assert cost(model, **COUNTED) == hardened


def test_weights_that_were_rounded_in_an_earlier_pass_are_seen_all_the_same() -> None:
    model = _learned("bert", _spec("bert", Placement.SEPARATE)).eval()
    counted = cost(model, **COUNTED)
    with torch.no_grad():
        model(input_ids=torch.ones(1, TOKENS, dtype=torch.long))
    assert cost(model, **COUNTED) == counted


def test_the_model_is_left_unmerged_and_its_weights_as_they_were() -> None:
    model = _learned("bert", _spec("bert"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost(model, **COUNTED)
    assert not any(layer.merged for _, layer in adapted_layers(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_disabled_adapter_costs_nothing_and_rounds_nothing() -> None:
    model = _learned("bert", _spec("bert"))
    with model.disable_adapter():
        record = cost(model, **COUNTED)
    assert {p.bits_right for p in record.products} == {32}
    assert {w.bits for w in record.weights} == {32}


def test_the_deployed_layer_is_its_packed_weight_and_its_ranges() -> None:
    model = _learned("bert", _spec("bert", granularity=Granularity.GROUP))
    record = cost(model, **COUNTED)
    widths = {entry.name.removeprefix("base_model.model."): entry.bits for entry in summarize(model)}
    (query,) = [key for key in widths if "layer.0" in key and key.endswith("query")]
    key = query.removesuffix("query") + "key"
    elements, groups = 32 * 32, 32 * 2

    def kept(module: str) -> dict[str, WeightRecord]:
        return {w.operand: w for w in record.weights if w.module == module}

    assert kept(query)["W0"].size_bytes == elements * widths[query]["weight"] // 8 + 4 * groups
    assert kept(query)["ranges"].elements == 2, "of input and output"
    assert kept(key)["ranges"].elements == 1, "the input's is kept with the queries"
    bits = {p.module: (p.bits_left, p.bits_right) for p in record.products if p.op == "linear"}
    assert bits[key] == (widths[query]["input"], widths[key]["weight"])
    assert Site.INPUT not in dict(adapted_layers(model))[f"base_model.model.{key}"].sites_of("default")
