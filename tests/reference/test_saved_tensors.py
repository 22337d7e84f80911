"""The bytes that our formulas say autograd keeps, against those it does keep, on small models of real classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rankbits import BayesianLoraConfig, MoraConfig
from rankbits.accounting.activations import forward_bytes
from rankbits.accounting.architectures.read import Head, read_shape
from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.spec import Granularity, Method, MethodSpec, ModelShape, Placement

# PEFT asks transformers for a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
BATCH, LENGTH, CLASSES = 3, 16, 2
SITES = ("weight", "down", "diagonal", "up", "down_output", "diagonal_output", "output")
TARGETS = {"bert": ("query", "key", "value"), "llama": ("q_proj", "k_proj", "v_proj")}


def kept_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[int, Tensor]:
    """Bytes of the distinct storages that autograd keeps in one training pass, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), loss


def _config(family: str, *, dropout: float, layers: int) -> BertConfig | LlamaConfig:
    if family == "bert":
        return BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    return LlamaConfig(
        vocab_size=60,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )


def build(
    family: str, *, dropout: float = 0.0, attention: str = "sdpa", layers: int = 2
) -> tuple[Any, ModelShape, dict[str, Tensor]]:
    """A model, its shape and a batch without padding."""
    torch.manual_seed(0)
    config = _config(family, dropout=dropout, layers=layers)
    config._attn_implementation = attention
    ids = torch.randint(3, 50, (BATCH, LENGTH))
    bert = family == "bert"
    model = BertForSequenceClassification(config) if bert else LlamaForCausalLM(config)
    head = Head.CLASSIFICATION if bert else Head.LANGUAGE_MODEL
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["labels"] = torch.zeros(BATCH, dtype=torch.long) if bert else ids
    shape = read_shape(config.to_dict(), name=family, head=head, num_labels=CLASSES)
    return model.train(), shape, inputs


def adapt(model: Any, family: str, method: Method, **changes: Any) -> Any:
    """The model with the adapters that `spec` describes."""
    shared = {"target_modules": list(TARGETS[family]), "modules_to_save": ["classifier"] if family == "bert" else None}
    shared |= {"task_type": "SEQ_CLS" if family == "bert" else "CAUSAL_LM"}
    if method is Method.LORA:
        return get_peft_model(model, LoraConfig(r=4, **shared)).train()
    if method is Method.MORA:
        return get_peft_model(model, MoraConfig(r=4, **shared)).train()
    if method is Method.BAYESIAN_LORA:
        # With B at zero its quantizer would have nothing to make a range of.
        config = BayesianLoraConfig(r=4, calibration_passes=0, init_weights=False, **shared, **changes)
        return get_peft_model(model, config).train()
    return model


def described(family: str, method: Method, **changes: Any) -> MethodSpec:
    """What `adapt` attaches, as the formulas take it."""
    full = method is Method.FULL
    sites = SITES if method is Method.BAYESIAN_LORA else ()
    return MethodSpec(
        method,
        rank=4,
        targets=None if full else TARGETS[family],
        trained_in_full=("classifier",) if family == "bert" and not full else (),
        **{"sites": sites, **changes},
    )


def settled(model: Any, inputs: dict[str, Tensor]) -> Any:
    """The model after two passes, in which quantizers find their ranges."""
    for _ in range(2):
        model(**inputs).loss.backward()
    model.zero_grad()
    return model


CASES = [(family, method) for family in TARGETS for method in (Method.FULL, Method.LORA, Method.BAYESIAN_LORA)]


@pytest.mark.parametrize(("family", "method"), CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_a_pass_keeps_is_exact_without_dropout(family: str, method: Method, attention: Any) -> None:
    model, shape, inputs = build(family, attention=attention)
    model = settled(adapt(model, family, method), inputs)
    settings = TrainingSettings(batch=BATCH, sequence_length=LENGTH, attention=attention, dropout=False)
    found = forward_bytes(shape, described(family, method), settings)
    assert found.kept + found.logits == kept_bytes(model, inputs)[0]


@pytest.mark.parametrize("method", [Method.FULL, Method.LORA, Method.BAYESIAN_LORA])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_keeps_its_noise_and_takes_the_fused_kernel_away(method: Method, attention: Any) -> None:
    model, shape, inputs = build("bert", dropout=0.1, attention=attention)
    model = settled(adapt(model, "bert", method), inputs)
    settings = TrainingSettings(batch=BATCH, sequence_length=LENGTH, attention=attention)
    found = forward_bytes(shape, described("bert", method), settings)
    assert found.kept + found.logits == kept_bytes(model, inputs)[0]


@pytest.mark.parametrize(("family", "dropout"), [("bert", 0.0), ("bert", 0.1), ("llama", 0.0)])
def test_mora_keeps_the_blocks_that_its_matrix_multiplies(family: str, dropout: float) -> None:
    model, shape, inputs = build(family, dropout=dropout)
    model = adapt(model, family, Method.MORA)
    settings = TrainingSettings(batch=BATCH, sequence_length=LENGTH, dropout=dropout > 0)
    found = forward_bytes(shape, described(family, Method.MORA), settings)
    assert found.kept + found.logits == kept_bytes(model, inputs)[0]


@pytest.mark.parametrize(
    "quantizers", [["weight"], ["down_output"], ["diagonal_output", "up"], ["output", "down"], ["input", "diagonal"]]
)
@pytest.mark.parametrize("learn_rank", [True, False])
def test_each_quantizer_keeps_what_its_formula_says(quantizers: list[str], learn_rank: bool) -> None:
    model, shape, inputs = build("llama")
    model = adapt(model, "llama", Method.BAYESIAN_LORA, quantizers=quantizers, learn_rank=learn_rank)
    spec = described("llama", Method.BAYESIAN_LORA, sites=tuple(quantizers), learn_rank=learn_rank)
    settings = TrainingSettings(batch=BATCH, sequence_length=LENGTH)
    found = forward_bytes(shape, spec, settings)
    assert found.kept + found.logits == kept_bytes(settled(model, inputs), inputs)[0]


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("learn_rank", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("placement", Placement)
def test_each_form_of_the_weight_quantizer_keeps_what_its_formula_says(
    placement: Placement, rows: int | None, tied: bool, learn_rank: bool, granularity: Granularity
) -> None:
    model, shape, inputs = build("llama")
    sites = ("weight", "output", "input")
    shared: dict[str, Any] = {"group_size": 16, "weight_gradient_rows": rows, "learn_rank": learn_rank}
    attached = {"placement": placement.value, "granularity": granularity.value, "tie_groups": "fused" if tied else None}
    model = adapt(model, "llama", Method.BAYESIAN_LORA, quantizers=list(sites), **shared, **attached)
    described_as = {"placement": placement, "granularity": granularity, "tie_groups": tied}
    spec = described("llama", Method.BAYESIAN_LORA, sites=sites, **shared, **described_as)
    found = forward_bytes(shape, spec, TrainingSettings(batch=BATCH, sequence_length=LENGTH))
    assert found.kept + found.logits == kept_bytes(settled(model, inputs), inputs)[0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", TARGETS)
def test_a_quantized_attention_keeps_what_its_formula_says(family: str, dropout: float) -> None:
    model, shape, inputs = build(family, dropout=dropout)
    changes: dict[str, Any] = {"quantize_attention": True}
    model = adapt(model, family, Method.BAYESIAN_LORA, quantizers=["weight", "input"], **changes)
    spec = described(family, Method.BAYESIAN_LORA, sites=("weight", "input"), **changes)
    settings = TrainingSettings(batch=BATCH, sequence_length=LENGTH, dropout=dropout > 0 and family == "bert")
    found = forward_bytes(shape, spec, settings)
    assert found.kept + found.logits == kept_bytes(settled(model, inputs), inputs)[0]


@pytest.mark.parametrize("granularity", [Granularity.TENSOR, Granularity.CHANNEL])
def test_a_quantized_head_keeps_what_its_formula_says(granularity: Granularity) -> None:
    model, shape, inputs = build("bert")
    chosen: dict[str, Any] = {"quantize_head": True, "learn_rank": False}
    model = adapt(model, "bert", Method.BAYESIAN_LORA, quantizers=["weight"], granularity=granularity.value, **chosen)
    spec = described("bert", Method.BAYESIAN_LORA, sites=("weight",), granularity=granularity, **chosen)
    found = forward_bytes(shape, spec, TrainingSettings(batch=BATCH, sequence_length=LENGTH, dropout=False))
    assert found.kept + found.logits == kept_bytes(settled(model, inputs), inputs)[0]


@pytest.mark.parametrize(("family", "method"), CASES)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_within_a_seventh(family: str, method: Method, autocast: bool) -> None:
    model, shape, inputs = build(family)
    model = adapt(model if autocast else model.to(torch.bfloat16), family, method)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        measured = kept_bytes(settled(model, inputs), inputs)[0]
    base: Any = "fp32" if autocast else "bf16"
    settings = TrainingSettings(batch=BATCH, sequence_length=LENGTH, dropout=False, precision="bf16", base=base)
    found = forward_bytes(shape, described(family, method), settings)
    assert found.kept + found.logits == pytest.approx(measured, rel=1 / 7)


@pytest.mark.parametrize(("family", "method"), [("bert", Method.FULL), ("llama", Method.FULL), ("llama", Method.LORA)])
def test_checkpointing_keeps_block_inputs_and_one_block_at_a_time(family: str, method: Method) -> None:
    def measured(layers: int, *, checkpointing: bool) -> int:
        model, _, inputs = build(family, layers=layers)
        model = adapt(model, family, method)
        if checkpointing:
            model.activation_checkpointing_enable()
        return kept_bytes(model, inputs)[0]

    # What one more block keeps is what running it again will need.
    block = measured(3, checkpointing=False) - measured(2, checkpointing=False)
    expected = measured(3, checkpointing=True) + block
    _, shape, _ = build(family, layers=3)
    settings = TrainingSettings(batch=BATCH, sequence_length=LENGTH, dropout=False, checkpointing=True)
    found = forward_bytes(shape, described(family, method), settings)
    assert found.kept + found.logits == pytest.approx(expected, rel=0.03)
