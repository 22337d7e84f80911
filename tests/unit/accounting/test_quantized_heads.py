"""Quantized heads by formula: products, weights and budgets are those of the live model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from rankbits import BayesianLoraConfig, Budget, GateSchedule, cost, harden
from rankbits.accounting.architectures.read import Head, read_shape
from rankbits.accounting.budget import expectation
from rankbits.accounting.params import check_head, quantized_heads
from rankbits.accounting.predict import predict
from rankbits.accounting.spec import Granularity, Method, MethodSpec, Placement
from rankbits.errors import ModelError
from rankbits.records import CostRecord, CountOptions
from rankbits.tuners.bayesian_lora import learning_adapters

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LENGTH = 16
CONFIG = BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=50,
    max_position_embeddings=32,
    num_labels=3,
)
SHAPE = read_shape(CONFIG.to_dict(), name="bert", head=Head.CLASSIFICATION, num_labels=3)
HEADS = ("bert.pooler.dense", "classifier")


def _spec(placement: Placement, granularity: Granularity = Granularity.CHANNEL) -> MethodSpec:
    return MethodSpec(
        Method.BAYESIAN_LORA,
        rank=2,
        targets=("query", "key"),
        sites=("weight", "input"),
        learn_rank=False,
        placement=placement,
        granularity=granularity,
        input_granularity=granularity if granularity is Granularity.GROUP else Granularity.TENSOR,
        affine_inputs=granularity is Granularity.GROUP,
        group_size=8,
        scale_bits=16,
        quantize_head=True,
        trained_in_full=("pooler", "classifier"),
    )


def _live(spec: MethodSpec) -> Any:
    """A model whose gates stand at random."""
    torch.manual_seed(0)
    config = BayesianLoraConfig(
        r=2,
        target_modules=["query", "key"],
        modules_to_save=["pooler"],
        task_type="SEQ_CLS",
        quantizers=list(spec.sites),
        learn_rank=False,
        placement=spec.placement.value,
        granularity=spec.granularity.value,
        input_granularity=spec.input_granularity.value,
        activation_ranges="affine" if spec.affine_inputs else "largest",
        group_size=spec.group_size,
        scale_bits=spec.scale_bits,
        init_weights=False,
        calibration_passes=1,
        quantize_head=True,
    )
    model = get_peft_model(BertForSequenceClassification(CONFIG), config).train()
    model(input_ids=torch.arange(1, LENGTH + 1)[None])
    return model


def _products(record: CostRecord) -> Counter[tuple[Any, ...]]:
    return Counter(
        (p.module, p.macs, p.adapter, *sorted([(p.left, p.bits_left), (p.right, p.bits_right)]))
        for p in record.products
        if p.kind == "weight"
    )


def _weights(record: CostRecord) -> Counter[tuple[Any, ...]]:
    return Counter((w.module, w.operand, w.elements, w.bits, w.scales, w.scale_bits, w.adapter) for w in record.weights)


@pytest.mark.parametrize("form", ["merged", "unmerged"])
@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("granularity", [Granularity.CHANNEL, Granularity.GROUP])
def test_products_and_weights_are_those_of_the_live_model(
    granularity: Granularity, placement: Placement, form: Any
) -> None:
    spec = replace(_spec(placement, granularity), sites=("weight",))
    model = _live(spec)
    with torch.no_grad():
        for row, (_, _, gates) in enumerate(learning_adapters(model)):
            gates.bit_logits.copy_(torch.tensor([6.0 if gate <= row % 4 else -6.0 for gate in range(4)]))
    GateSchedule(model, 10).step()
    harden(model)
    spec = replace(spec, widths=model.peft_config["default"].hardened_bits)
    record = cost(model, sequence_length=LENGTH, adapters=form)
    expected = predict(SHAPE, record.options, spec)
    assert _products(record) == _products(expected)
    of_head = {key: n for key, n in _weights(record).items() if key[0] in HEADS}
    assert of_head == {key: n for key, n in _weights(expected).items() if key[0] in HEADS}
    widths = {p.module: (p.bits_left, p.bits_right) for p in expected.products if p.module in HEADS}
    assert set(widths) == set(HEADS)
    assert max(max(pair) for pair in widths.values()) < 32


@pytest.mark.parametrize("text", ["bits=8", "bytes=0.6"])
@pytest.mark.parametrize("placement", Placement)
def test_budgets_reach_what_the_live_model_reaches(placement: Placement, text: str) -> None:
    spec, model = _spec(placement), _live(_spec(placement))
    budget = Budget(*_parts(text), 16)
    (state,) = GateSchedule(model, 10, budget=budget).budgets()
    options = CountOptions(query_len=LENGTH, key_len=LENGTH)
    found = expectation(SHAPE, spec, options, budget)
    assert found.high == pytest.approx(state.cost, rel=1e-9)


@pytest.mark.parametrize("scope", ["adapted", "model"])
@pytest.mark.parametrize("placement", Placement)
def test_budgets_of_bit_operations_reach_what_the_live_model_reaches(placement: Placement, scope: Any) -> None:
    spec, model = _spec(placement), _live(_spec(placement))
    budget = Budget("bops", 3.5, 16, LENGTH, scope)
    (state,) = GateSchedule(model, 10, budget=budget).budgets()
    options = CountOptions(query_len=LENGTH, key_len=LENGTH)
    assert expectation(SHAPE, spec, options, budget).high == pytest.approx(state.cost, rel=1e-9)


def _parts(text: str) -> tuple[str, float]:
    name, _, limit = text.partition("=")
    return name, float(limit)


def test_only_layers_that_are_trained_in_full_are_heads() -> None:
    spec = _spec(Placement.MERGED)
    assert [linear.name for linear in quantized_heads(SHAPE, spec)] == list(HEADS)
    assert quantized_heads(SHAPE, replace(spec, quantize_head=False)) == []
    assert quantized_heads(SHAPE, replace(spec, method=Method.LORA)) == []
    with pytest.raises(ModelError, match="quantize_head: no linear layer of bert is trained in full"):
        check_head(SHAPE, replace(spec, trained_in_full=()))
