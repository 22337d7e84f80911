"""The live count of a model with learned widths and ranks, and its agreement with the count from a config alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from rankbits import BayesianLoraConfig, GateSchedule, harden
from rankbits.accounting.architectures.read import Head, read_shape
from rankbits.accounting.macs import products
from rankbits.accounting.measure import cost
from rankbits.accounting.predict import predict
from rankbits.accounting.spec import Method, MethodSpec
from rankbits.errors import ModelError
from rankbits.records import CostRecord, Product
from rankbits.tuners.bayesian_lora import adapted_layers, summarize
from rankbits.tuners.bayesian_lora.config import Site

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BATCH, TOKENS = 2, 6
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
DEBERTA = SIZES | {
    "relative_attention": True,
    "position_buckets": 8,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
BART = {"vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 40}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40}
MODELS: dict[str, tuple[type, Any, Head]] = {
    "bert": (BertForSequenceClassification, BertConfig(**SIZES), Head.CLASSIFICATION),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**SIZES, pad_token_id=1), Head.CLASSIFICATION),
    "deberta": (DebertaV2ForSequenceClassification, DebertaV2Config(**DEBERTA), Head.CLASSIFICATION),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2), Head.LANGUAGE_MODEL),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4),
        Head.LANGUAGE_MODEL,
    ),
    "bart": (BartModel, BartConfig(**BART), Head.NONE),
}
TARGETS = {
    "bert": ("query", "key", "value"),
    "deberta": ("query_proj", "key_proj", "value_proj"),
    "llama": ("q_proj", "v_proj"),
    "t5": ("q", "v"),
}
# Widths and ranks that training might have left, different from layer to layer and from site to site.
WIDTHS = {"weight": 4, "down": 8, "diagonal": 16, "up": 2, "down_output": 16, "diagonal_output": 8, "output": 4}
GATED = (4, 8, 16, 32)


def _model(name: str) -> Any:
    model_class, config, _ = MODELS[name]
    torch.manual_seed(0)
    return model_class(config)


def _essence(product: Product) -> tuple[Any, ...]:
    """What both counts must agree on. A live count calls a classifier a head; operands may be either way round."""
    op = "linear" if product.op == "head" else product.op
    operands = sorted([(product.left, product.bits_left), (product.right, product.bits_right)])
    return (product.module, op, product.macs, product.kind, product.constant, product.adapter, *operands)


def _predicted(name: str, record: CostRecord, spec: MethodSpec | None = None) -> list[Product]:
    config = MODELS[name][1]
    shape = read_shape(config.to_dict(), name=name, head=MODELS[name][2])
    return products(shape, record.options, spec)


def _assert_agree(record: CostRecord, expected: list[Product]) -> None:
    live, formulas = (Counter(map(_essence, found)) for found in (record.products, expected))
    assert live - formulas == formulas - live == Counter()


@pytest.mark.parametrize("positions", ["recomputed", "cached"])
@pytest.mark.parametrize("name", MODELS)
def test_live_and_predicted_products_are_the_same(name: str, positions: str) -> None:
    record = cost(_model(name), sequence_length=TOKENS, batch=BATCH, positions=positions)
    _assert_agree(record, _predicted(name, record))


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_a_decode_step_is_predicted_too(name: str) -> None:
    source = {} if name == "llama" else {"source_len": 5}
    record = cost(_model(name), query_len=2, key_len=9, batch=BATCH, **source)
    _assert_agree(record, _predicted(name, record))


@pytest.mark.parametrize("positions", ["recomputed", "cached"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", TARGETS)
def test_adapters_are_predicted_too(name: str, dora: bool, positions: str) -> None:
    model = get_peft_model(_model(name), LoraConfig(r=3, target_modules=[*TARGETS[name]], use_dora=dora))
    record = cost(model, sequence_length=TOKENS, batch=BATCH, adapters="unmerged", positions=positions)
    spec = MethodSpec(Method.DORA if dora else Method.LORA, rank=3, targets=TARGETS[name])
    expected = _predicted(name, record.model_copy(update={"options": _recomputed(record)}), spec)
    _assert_agree(record, expected if positions == "recomputed" else _without_cached_rows(expected))


def _recomputed(record: CostRecord) -> Any:
    return record.options.model_copy(update={"positions": "recomputed"})


def _without_cached_rows(expected: list[Product]) -> list[Product]:
    """Without position rows; PEFT runs DoRA's weight norm at every call, so one of a layer's two calls is left."""
    norms = {(product.module, product.op): product for product in expected if product.op.startswith("dora")}
    return [product for product in expected if not product.constant] + [*norms.values()]


def _calibrated(name: str = "bert", **settings: Any) -> Any:
    chosen = {"r": 4, "target_modules": [*TARGETS[name]], "calibration_passes": 1, "init_weights": False}
    model = get_peft_model(_model(name), BayesianLoraConfig(**(chosen | settings)))
    GateSchedule(model, 10).step()
    model.train()
    with torch.no_grad():
        model(input_ids=torch.arange(1, 1 + 3 * TOKENS).reshape(3, TOKENS))
    for _, layer in adapted_layers(model):
        layer.finish_calibration("default")
    return model


@torch.no_grad()
def _learn(model: Any, *, rank: int = 3) -> None:
    """Close gates: every site to its entry of WIDTHS, every layer to `rank`."""
    for _, layer in adapted_layers(model):
        gates = layer.gates_of("default")
        if gates.bit_logits is not None:
            for row, site in zip(gates.bit_logits, layer.sites_of("default"), strict=True):
                row.copy_(torch.tensor([6.0 if width <= WIDTHS[site.value] else -6.0 for width in GATED]))
        if gates.rank_logits is not None:
            gates.rank_logits.fill_(-9.0)
            gates.rank_logits[: rank - 1] = 9.0


def _spec(name: str, model: Any) -> MethodSpec:
    prefix = "base_model.model."
    learned = {entry.name.removeprefix(prefix): entry for entry in summarize(model)}
    return MethodSpec(
        Method.BAYESIAN_LORA,
        rank=4,
        targets=TARGETS[name],
        ranks={key: entry.rank for key, entry in learned.items()},
        widths={key: entry.bits for key, entry in learned.items()},
    )


@pytest.mark.parametrize("hardened", [False, True], ids=["learning", "hardened"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_learned_widths_and_ranks_reach_their_products(name: str, hardened: bool) -> None:
    model = _calibrated(name)
    _learn(model)
    spec = _spec(name, model)
    assert set(spec.ranks.values()) == {3}
    if hardened:
        harden(model)
    record = cost(model, sequence_length=TOKENS, batch=BATCH)
    assert record.options.adapters == "unmerged"
    _assert_agree(record, _predicted(name, record, spec))


def test_widths_of_one_attention_block() -> None:
    model = _calibrated()
    _learn(model)
    found = {
        (product.module.rpartition("encoder.layer.0.attention.")[2], product.op): (
            (product.left, product.bits_left),
            (product.right, product.bits_right),
        )
        for product in cost(model, sequence_length=TOKENS).products
        if "encoder.layer.0.attention." in product.module
    }
    for last in ("query", "key", "value"):
        assert found[f"self.{last}", "linear"] == (("x", 32), ("W0", 4))
        assert found[f"self.{last}", "lora_down"] == (("x", 32), ("A", 8))
        assert found[f"self.{last}", "lora_up"] == (("h", 8), ("B", 2))
    assert found["self", "scores"] == (("q", 4), ("k", 4))
    assert found["self", "context"] == (("p", 32), ("v", 4))
    assert found["output.dense", "linear"] == (("x", 32), ("W0", 32))


def test_quantized_inputs_reach_the_products_that_read_them() -> None:
    model = _calibrated(quantizers=["weight", "input"])
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            for site, logits in (("weight", [6.0, -6, -6, -6]), ("input", [6.0, 6, -6, -6])):
                gates, row = layer.gate_of("default", Site(site))
                gates.bit_logits[row].copy_(torch.tensor(logits))
    # The keys' layer has no quantizer of the input of its own: it reads what the queries' has rounded.
    for last in ("query", "key"):
        found = [p for p in cost(model, sequence_length=TOKENS).products if p.module.endswith(last)]
        bits = {p.op: (p.bits_left, p.bits_right) for p in found}
        assert bits == {"linear": (8, 4), "lora_down": (8, 32), "lora_up": (32, 32)}


def test_weights_are_those_that_inference_keeps() -> None:
    model = _calibrated(modules_to_save=["classifier"])
    _learn(model)
    learning = cost(model, sequence_length=TOKENS).weights
    assert cost(harden(model), sequence_length=TOKENS).weights == learning
    query = {
        w.operand: (w.elements, w.bits, w.scales, w.adapter)
        for w in learning
        if w.module == "bert.encoder.layer.1.attention.self.query"
    }
    assert query == {
        "W0": (32 * 32, 4, 1, None),
        "bias": (32, 32, 0, None),
        "A": (3 * 32, 8, 1, "default"),
        "E": (3, 16, 1, "default"),
        "B": (3 * 32, 2, 1, "default"),
        "ranges": (3, 32, 0, "default"),
    }
    assert [w.elements for w in learning if w.module == "classifier"] == [2 * 32, 2]


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_a_base_model_are_its_parameters(name: str) -> None:
    model = _model(name)
    whole = cost(model, sequence_length=TOKENS, embeddings="in").weights
    assert sum(w.elements for w in whole) == sum(p.numel() for p in model.parameters())
    tables = sum(p.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in set(m.parameters()))
    listed = sum(w.elements for w in whole if w.operand == "table")
    tied = 60 * 32 if name == "t5" else 0  # its head needs the table's weight even where tables are not counted
    without = sum(w.elements for w in cost(model, sequence_length=TOKENS).weights)
    assert without == sum(w.elements for w in whole) - listed + tied
    assert 0 < listed <= tables


TIED = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "t5": (T5ForConditionalGeneration, MODELS["t5"][1]),
    "bart": (BartForConditionalGeneration, BartConfig(**BART)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4, n_positions=40)),
}


@pytest.mark.parametrize("embeddings", ["out", "in"])
@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_needs_its_weight_where_tables_are_not_counted(name: str, embeddings: str) -> None:
    model_class, config = TIED[name]
    record = cost(model_class(config), sequence_length=TOKENS, embeddings=embeddings)
    shape = read_shape(config.to_dict(), name=name, head=Head.LANGUAGE_MODEL)
    assert record.weight_bytes == predict(shape, record.options).weight_bytes
    heads = [(w.operand, w.elements) for w in record.weights if w.module == "lm_head"]
    assert heads == ([("W0", 60 * 32)] if embeddings == "out" else [])


def test_work_on_position_rows_and_in_the_head_follows_the_options() -> None:
    everything, cached = (
        cost(_model("deberta"), sequence_length=TOKENS, positions=choice) for choice in ("recomputed", "cached")
    )
    rows = {(e.module, e.op): e.elements for e in everything.elements}
    kept = {(e.module, e.op): e.elements for e in cached.elements}
    key = "deberta.encoder.layer.0.attention.self.key_proj", "bias"
    assert (rows[key], kept[key]) == ((TOKENS + 2 * 8) * 32, TOKENS * 32)

    def head_work(choice: str) -> int:
        model = get_peft_model(_model("llama"), LoraConfig(r=2, target_modules=["lm_head"]))
        record = cost(model, sequence_length=TOKENS, batch=BATCH, head=choice, adapters="unmerged")
        return sum(work.elements for work in record.elements if work.module == "lm_head")

    assert head_work("out") == 0
    assert head_work("all") == TOKENS * head_work("last") > 0


def test_adapters_are_merged_where_that_is_exact() -> None:
    plain = _calibrated(learn_bits=False)
    merged = cost(plain, sequence_length=TOKENS)
    assert merged.options.adapters == "merged"
    assert merged.products == cost(_model("bert"), sequence_length=TOKENS).products
    assert {w.adapter for w in merged.weights} == {None}

    weights_only = _calibrated(quantizers=["weight", "up"])
    _learn(weights_only)
    assert cost(weights_only, sequence_length=TOKENS).options.adapters == "unmerged"
    wide = cost(weights_only, sequence_length=TOKENS, adapters="merged")
    assert {p.bits_right for p in wide.products if p.kind == "weight"} == {32}

    with pytest.raises(ModelError, match=r"given 'merged'.*query.*activations.*expected 'unmerged'"):
        cost(_calibrated(), sequence_length=TOKENS, adapters="merged")


def test_a_model_with_injected_adapters_counts_like_one_that_peft_wraps() -> None:
    config = BayesianLoraConfig(r=4, target_modules=[*TARGETS["bert"]], learn_bits=False)
    wrapped = cost(get_peft_model(_model("bert"), config), sequence_length=TOKENS, adapters="unmerged")
    injected = cost(inject_adapter_in_model(config, _model("bert")), sequence_length=TOKENS, adapters="unmerged")
    assert injected == wrapped
    assert wrapped.adapter_share > 0


def _state(model: Any) -> dict[str, Any]:
    modules = {name: (module.training, set(vars(module))) for name, module in model.named_modules()}
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    warned = {name: vars(module).get("_warned") for name, module in model.named_modules()}
    return {"modules": modules, "requires_grad": requires_grad, "warned": warned, "config": model.config.to_dict()}


@pytest.mark.parametrize(
    "sizes", [{"sequence_length": TOKENS}, {"sequence_length": TOKENS, "inputs": {"input_ids": 1}}]
)
def test_the_model_and_the_random_state_are_left_as_they_were(sizes: dict[str, Any]) -> None:
    model = _calibrated()
    model.get_submodule("base_model.model.bert.encoder").eval()
    state, tensors = _state(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    fused = torch.backends.mha.get_fastpath_enabled()
    if "inputs" in sizes:
        with pytest.raises(ModelError, match="BertForSequenceClassification could not run"):
            cost(model, **sizes)
    else:
        cost(model, **sizes)
    assert _state(model) == state
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() is fused
    assert torch.is_grad_enabled()
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_quantizer_that_was_not_calibrated_warns_the_user_and_not_the_count() -> None:
    model = get_peft_model(_model("bert"), BayesianLoraConfig(r=4, target_modules=["query"])).eval()
    cost(model, sequence_length=TOKENS)
    with pytest.warns(UserWarning, match="before its range was calibrated"):
        model(input_ids=torch.ones(1, TOKENS, dtype=torch.long))


def test_adapters_that_cannot_be_seen_are_refused_by_name() -> None:
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    model = get_peft_model(_model("llama"), config)
    with pytest.raises(ModelError, match="ADAPTION_PROMPT"):
        cost(model, sequence_length=TOKENS)
    with model.disable_adapter():
        assert cost(model, sequence_length=TOKENS).macs == cost(_model("llama"), sequence_length=TOKENS).macs
