"""What a budget counts while gates learn is what the accounting room counts on the hardened model, exactly."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from rankbits import BayesianLoraConfig, Budget, GateSchedule, cost, harden, optimizer_and_scheduler, summary
from rankbits.errors import ScheduleError
from rankbits.records import CostRecord
from rankbits.tuners.bayesian_lora import adapted_layers, gated_layers, learning_adapters, quantized_heads
from rankbits.tuners.bayesian_lora.config import PAPER_SITES, Site
from rankbits.tuners.bayesian_lora.head import base_key

LENGTH = 16
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
ALL_SITES = [*PAPER_SITES, Site.INPUT]


def _bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))


def _deberta() -> nn.Module:
    return DebertaV2ForSequenceClassification(
        DebertaV2Config(
            **SIZES,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            type_vocab_size=0,
        )
    )


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


MODELS = {"bert": _bert, "deberta": _deberta, "llama": _llama}
LAYOUTS: dict[str, dict[str, Any]] = {
    "merged": {"placement": "merged"},
    "merged, by channel, tied": {
        "placement": "merged",
        "quantizers": ["weight", "input", "output"],
        "granularity": "channel",
        "scale_bits": 8,
        "tie_groups": "fused",
    },
    "separate": {"quantizers": ALL_SITES},
    "separate, no input": {},
}
ATTENTION: dict[str, dict[str, Any]] = {
    "merged": {"placement": "merged", "quantize_attention": True},
    "separate": {"quantizers": ["weight", "up", "input"], "quantize_attention": True},
}


def _learned(model: nn.Module, **settings: Any) -> PeftModel:
    """An adapted model with calibrated quantizers and gates at random."""
    chosen: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_weights": False}
    if hasattr(model, "classifier"):
        chosen["exclude_modules"] = ["classifier"]
    adapted = get_peft_model(model, BayesianLoraConfig(**(chosen | {"calibration_passes": 1} | settings))).train()
    adapted(input_ids=torch.arange(1, LENGTH + 1)[None])
    with torch.no_grad():
        for _, _, gates in learning_adapters(adapted):
            for logits in (gates.bit_logits, gates.rank_logits):
                if logits is not None:
                    logits.copy_(torch.randn_like(logits) * 2.0 + 1.0)
    return adapted


def _costs(model: PeftModel, *budgets: Budget | str) -> list[float]:
    # One after another: together some would contradict others.
    return [GateSchedule(model, 10, budget=budget).budgets()[0].cost for budget in budgets]


def _counted(model: PeftModel) -> tuple[CostRecord, set[str]]:
    """The record of the hardened model, and the names of its adapted layers."""
    for _, layer in adapted_layers(model):
        layer.bayesian_lora_steps["default"].fill_(1)
    harden(model)
    names = {base_key(name.removeprefix("base_model.model."), "default") for name, _ in gated_layers(model)}
    return cost(model, sequence_length=LENGTH), names


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_cost_is_that_of_the_record_after_hardening(kind: str, layout: str) -> None:
    model = _learned(MODELS[kind](), **LAYOUTS[layout])
    bops, size, bits = _costs(model, Budget("bops", 2.0, 16, LENGTH), "bytes=1.0", "bits=20")
    (whole,) = _costs(model, Budget("bops", 0.9, 32, LENGTH, "model")) if kind == "bert" else (None,)
    record, names = _counted(model)
    products = [product for product in record.products if product.module in names]
    base = sum(product.macs for product in products if product.adapter is None)
    assert bops == pytest.approx(sum(p.bops for p in products) / (base * 16**2), rel=1e-12)
    weights = [w for w in record.weights if w.module in names and w.operand in {"W0", "A", "B", "E"}]
    numbers = sum(w.elements for w in weights if w.operand == "W0")
    assert size == pytest.approx(sum(w.size_bytes for w in weights) / (2 * numbers), rel=1e-12)
    assert bits == pytest.approx(
        sum(w.elements * w.bits for w in weights) / sum(w.elements for w in weights), rel=1e-12
    )
    if whole is not None:
        assert whole == pytest.approx(record.percent(32) / 100, rel=1e-12)


@pytest.mark.parametrize("kind", ["deberta", "llama"])
def test_the_whole_model_is_counted_with_its_attention(kind: str) -> None:
    model = _learned(MODELS[kind](), quantizers=ALL_SITES)
    (whole,) = _costs(model, Budget("bops", 3.0, 16, LENGTH, "model"))
    record, names = _counted(model)
    assert any(product.module not in names for product in record.products)
    assert whole == pytest.approx(record.percent(16) / 100, rel=1e-12)


HEAD: dict[str, Any] = {"quantize_head": True, "task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}


@pytest.mark.parametrize("layout", ["merged", "merged, by channel, tied", "separate"])
@pytest.mark.parametrize("kind", ["bert", "deberta"])
def test_quantized_heads_are_counted_in_both_scopes(kind: str, layout: str) -> None:
    model = _learned(MODELS[kind](), **(LAYOUTS[layout] | HEAD), exclude_modules=None)
    with torch.no_grad():
        for row, (_, head) in enumerate(quantized_heads(model)):
            head.gate_of("default", Site.WEIGHT)[0].bit_logits.copy_(torch.tensor([[6.0, row, -6, -6], [6, 6, 6, -6]]))
    bops, size, bits = _costs(model, Budget("bops", 2.0, 16, LENGTH), "bytes=1.0", "bits=20")
    (whole,) = _costs(model, Budget("bops", 3.0, 16, LENGTH, "model"))
    record, names = _counted(model)
    heads = {base_key(name.removeprefix("base_model.model."), "default") for name, _ in quantized_heads(model)}
    assert heads == {"classifier", "bert.pooler.dense" if kind == "bert" else "pooler.dense"}
    products = [product for product in record.products if product.module in names]
    widths = {p.module: (p.bits_left, p.bits_right) for p in products if p.module in heads}
    learned = model.peft_config["default"].hardened_bits
    assert widths == {name: (learned[name]["input"], learned[name]["weight"]) for name in heads}
    assert set(widths.values()) == {(16, 8)}
    base = sum(product.macs for product in products if product.adapter is None)
    assert bops == pytest.approx(sum(p.bops for p in products) / (base * 16**2), rel=1e-12)
    assert whole == pytest.approx(record.percent(16) / 100, rel=1e-12)
    weights = [w for w in record.weights if w.module in names and w.operand in {"W0", "A", "B", "E"}]
    numbers = sum(w.elements for w in weights if w.operand == "W0")
    assert size == pytest.approx(sum(w.size_bytes for w in weights) / (2 * numbers), rel=1e-12)
    assert bits == pytest.approx(
        sum(w.elements * w.bits for w in weights) / sum(w.elements for w in weights), rel=1e-12
    )


@pytest.mark.parametrize("hardened", [False, True])
def test_the_record_lists_each_tensor_of_a_quantized_head_once(hardened: bool) -> None:
    model = _learned(_bert(), **HEAD, placement="merged", granularity="channel")
    if hardened:
        record, _ = _counted(model)
    else:
        record = cost(model.eval(), sequence_length=LENGTH)
    bits = {entry.name.split(".")[2]: entry.bits["weight"] for entry in summary(model) if not entry.max_rank}
    listed = {(w.module, w.operand): (w.elements, w.bits, w.scales) for w in record.weights}
    of_head = {key: value for key, value in listed.items() if key[0] in {"bert.pooler.dense", "classifier"}}
    assert of_head == {
        ("bert.pooler.dense", "W0"): (32 * 32, bits["bert"], 32),
        ("bert.pooler.dense", "bias"): (32, 32, 0),
        ("bert.pooler.dense", "ranges"): (1, 32, 0),
        ("classifier", "W0"): (32 * 3, bits["classifier"], 3),
        ("classifier", "bias"): (3, 32, 0),
        ("classifier", "ranges"): (1, 32, 0),
    }
    assert sum(w.module in {"bert.pooler.dense", "classifier"} for w in record.weights) == len(of_head)


@pytest.mark.parametrize("placement", ["merged", "separate"])
def test_merged_adapters_leave_the_widths_of_the_head(placement: str) -> None:
    model = _learned(_bert(), **HEAD, placement=placement, quantizers=["weight"], learn_rank=False)
    _counted(model)
    learned = model.peft_config["default"].hardened_bits
    for record in (cost(model, sequence_length=LENGTH, adapters=form) for form in ("merged", "unmerged")):
        widths = {p.module: (p.bits_left, p.bits_right) for p in record.products}
        for name in ("bert.pooler.dense", "classifier"):
            assert widths[name] == (learned[name]["input"], learned[name]["weight"])
    with model.disable_adapter():
        plain = cost(model, sequence_length=LENGTH)
    assert {p.bits_right for p in plain.products if p.module == "classifier"} == {32}


def test_a_budget_is_met_with_a_quantized_head() -> None:
    torch.manual_seed(0)
    model = _learned(_bert(), **HEAD, placement="merged", calibration_passes=1).train()
    schedule = GateSchedule(model, 8, budget=Budget("bops", 0.3, 16, LENGTH), phases=(0.5, 0.25, 0.25))
    with torch.no_grad():
        for _, _, gates in learning_adapters(model):
            gates.bit_logits.fill_(6.0)
    optimizer, scheduler = optimizer_and_scheduler(schedule, learning_rate=1e-3)
    ids = torch.randint(1, 50, (4, LENGTH))
    for _ in range(8):
        model(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        scheduler.step()
        schedule.step()
        optimizer.zero_grad()
    (state,) = schedule.budgets()
    assert 0.25 < state.cost <= 0.3
    record, names = _counted(model)
    products = [product for product in record.products if product.module in names]
    base = sum(product.macs for product in products if product.adapter is None)
    assert state.cost == pytest.approx(sum(p.bops for p in products) / (base * 16**2), rel=1e-12)
    assert {"classifier", "bert.pooler.dense"} <= names


@pytest.mark.parametrize("layout", ATTENTION)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_products_of_attention_have_the_widths_of_both_operands(kind: str, layout: str) -> None:
    model = _learned(MODELS[kind](), **ATTENTION[layout])
    within, whole = (_costs(model, Budget("bops", 3.0, 16, LENGTH, scope))[0] for scope in ("adapted", "model"))
    record, names = _counted(model)
    assert whole == pytest.approx(record.percent(16) / 100, rel=1e-12)
    adapted = [product for product in record.products if product.module in names]
    base = sum(product.macs for product in adapted if product.adapter is None)
    assert within == pytest.approx(sum(p.bops for p in adapted) / (base * 16**2), rel=1e-12)
    learned = {entry.name.removeprefix("base_model.model."): entry.bits for entry in summary(model)}
    products = {(p.module, p.op): p for p in record.products if p.kind == "act"}
    assert len(products) == 4
    for (module, op), product in products.items():
        block = {name.rpartition(".")[2][0]: bits for name, bits in learned.items() if name.startswith(f"{module}.")}
        expected = (block["q"], block["k"]) if op == "scores" else ({"output": block["v"]["probabilities"]}, block["v"])
        assert (product.bits_left, product.bits_right) == tuple(bits["output"] for bits in expected)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_closing_gates_of_attention_pays_for_a_budget_of_the_whole_model(kind: str) -> None:
    model = _learned(MODELS[kind](), **ATTENTION["merged"])
    budget = Budget("bops", 3.0, 16, LENGTH, "model")
    (before,) = _costs(model, budget)
    for _, layer in adapted_layers(model):
        for site in (Site.OUTPUT, Site.PROBABILITIES):
            found = layer.gate_of("default", site)
            if found is not None:
                with torch.no_grad():
                    found[0].bit_logits[found[1]] = -6.0
    (after,) = _costs(model, budget)
    assert after < before
    record, _ = _counted(model)
    assert all((p.bits_left, p.bits_right) == (2, 2) for p in record.products if p.kind == "act")


def test_without_a_length_the_rows_of_all_layers_are_alike() -> None:
    model = _learned(_deberta(), placement="merged")
    (alike,) = _costs(model, "bops=2")
    (by_length,) = _costs(model, Budget("bops", 2.0, 16, LENGTH))
    layers = [(layer, layer.active_adapters[0]) for _, layer in adapted_layers(model)]
    macs = [layer.in_features * layer.out_features for layer, _ in layers]
    record, names = _counted(model)
    of = {p.module: p.bits_left * p.bits_right for p in record.products if p.module in names}
    assert alike == pytest.approx(sum(m * of[n] for m, n in zip(macs, of, strict=True)) / (sum(macs) * 256))
    assert alike != pytest.approx(by_length, rel=1e-3)


def test_the_mean_rank_is_that_of_the_layers() -> None:
    model = _learned(_bert())
    (mean,) = _costs(model, "rank=2.5")
    ranks = [int(gates.values(hard=True).ranks.sum()) for _, _, gates in learning_adapters(model)]
    assert mean == pytest.approx(sum(ranks) / len(ranks))


def test_a_model_that_no_formula_knows_counts_its_adapted_layers_alone(adapted) -> None:
    model = adapted(placement="merged")
    assert _costs(model, Budget("bops", 2.0, 16, LENGTH)) == [4.0]
    with pytest.raises(ScheduleError, match="whole model cannot be counted: Sequential has no config; give scope='ada"):
        GateSchedule(model, 10, budget=Budget("bops", 2.0, 16, LENGTH, "model"))
