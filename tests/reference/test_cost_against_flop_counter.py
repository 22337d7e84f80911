"""The live count against torch's FlopCounterMode: MACs of the list of products are half its FLOPs, difference zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from rankbits import BayesianLoraConfig
from rankbits.accounting.measure import cost
from rankbits.errors import ModelError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:a quantizer is evaluated before its range was calibrated"),
]

BATCH, TOKENS = 2, 7
ENCODER = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
DECODER = ENCODER | {"num_key_value_heads": 2}
DEBERTA = ENCODER | {
    "relative_attention": True,
    "position_buckets": 8,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 60,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
}
GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "minilm": (BertModel, BertConfig, ENCODER),
    "bert": (BertForSequenceClassification, BertConfig, ENCODER),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, ENCODER | {"pad_token_id": 1}),
    "deberta": (DebertaV2ForSequenceClassification, DebertaV2Config, DEBERTA),
    "llama": (LlamaForCausalLM, LlamaConfig, DECODER),
    "llama classifier": (LlamaForSequenceClassification, LlamaConfig, DECODER | {"pad_token_id": 0}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, DECODER),
    "phi": (PhiForCausalLM, PhiConfig, ENCODER),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "t5": (T5ForConditionalGeneration, T5Config, T5),
    "bart": (BartModel, BartConfig, BART),
    "bart classifier": (BartForSequenceClassification, BartConfig, BART),
}
SDPA = sorted(set(MODELS) - {"deberta"})
CACHED = ["llama", "qwen2", "phi", "gpt2", "t5", "bart"]


def _model(name: str, attention: str = "eager") -> Any:
    model_class, config_class, sizes = MODELS[name]
    torch.manual_seed(0)
    return model_class(config_class(**sizes, attn_implementation=attention))


def _ids(length: int = TOKENS) -> Tensor:
    ids = torch.full((BATCH, length), 5)
    ids[:, -1] = 2  # the end that BART's classifier looks for
    return ids


def _counter_macs(model: nn.Module, **inputs: Any) -> int:
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(**inputs)
    model.train(training)
    return counter.get_total_flops() // 2


def _inputs(name: str) -> dict[str, Tensor]:
    ids = {"input_ids": _ids()}
    return ids | {"decoder_input_ids": _ids()} if name.startswith(("t5", "bart")) else ids


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name: str) -> None:
    model = _model(name)
    record = cost(model, sequence_length=TOKENS, batch=BATCH)
    assert record.macs == record.reference_macs == _counter_macs(model, **_inputs(name))
    assert record.macs > 0


@pytest.mark.parametrize("name", SDPA)
def test_the_fused_attention_of_the_cpu_counts_as_the_eager_one(name: str) -> None:
    eager, fused = (cost(_model(name, kind), sequence_length=TOKENS, batch=BATCH) for kind in ("eager", "sdpa"))
    assert fused.products == eager.products


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"bart classifier"}))
def test_a_model_without_memory_counts_the_same(name: str) -> None:
    with torch.device("meta"):
        empty = _model(name, "sdpa" if name in SDPA else "eager")
    expected = cost(_model(name), sequence_length=TOKENS, batch=BATCH)
    assert cost(empty, sequence_length=TOKENS, batch=BATCH).products == expected.products


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CACHED)
def test_a_decode_step_with_a_cache(name: str, attention: str) -> None:
    cached, new, source = 9, 1, 5
    model = _model(name).eval()
    with torch.no_grad():
        if name in {"t5", "bart"}:
            first = model(input_ids=_ids(source), decoder_input_ids=_ids(cached), use_cache=True)
            inputs = {"encoder_outputs": (first.encoder_last_hidden_state,), "decoder_input_ids": _ids(new)}
        else:
            first = model(input_ids=_ids(cached), use_cache=True)
            inputs = {"input_ids": _ids(new)}
    expected = _counter_macs(model, **inputs, past_key_values=first.past_key_values, use_cache=True)
    sizes = {"query_len": new, "key_len": cached + new, "batch": BATCH}
    record = cost(_model(name, attention), **sizes, **({"source_len": source} if "encoder_outputs" in inputs else {}))
    assert record.macs == expected


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_a_decode_step_without_memory(name: str) -> None:
    sizes = {"query_len": 2, "key_len": 9, "batch": BATCH} | ({"source_len": 5} if name == "t5" else {})
    with torch.device("meta"):
        empty = _model(name)
    assert cost(empty, **sizes).products == cost(_model(name), **sizes).products


@pytest.mark.parametrize(
    ("tokens", "batch", "attention", "layer"),
    [
        (20, 1, 655_712_256, 761_880_576),
        (64, 1, 773_849_088, 1_113_587_712),
        (128, 1, 956_301_312, 1_635_778_560),
        (256, 1, 1_358_954_496, 2_717_908_992),
        (20, 4, 810_909_696, 1_235_582_976),
        (128, 8, 3_422_552_064, 8_858_370_048),
    ],
)
def test_one_layer_of_deberta_v3_base(tokens: int, batch: int, attention: int, layer: int) -> None:
    """B (3 T d^2 + 2 T^2 d + 2 T e d) + 2 e d^2, and 9 d^2 B T more, with d = 768 and e = 512."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1}
    config = DebertaV2Config(**(DEBERTA | sizes | {"position_buckets": 256, "max_position_embeddings": 512}))
    with torch.device("meta"):
        model = DebertaV2Model(config)
    record = cost(model, sequence_length=tokens, batch=batch)
    d, e = 768, 512
    rows = 2 * e * d * d
    assert attention == batch * (3 * tokens * d * d + 2 * tokens**2 * d + 2 * tokens * e * d) + rows
    assert record.macs == layer == attention + 9 * d * d * batch * tokens
    cached = cost(model, sequence_length=tokens, batch=batch, positions="cached")
    assert cached.macs == cached.reference_macs == layer - rows


def test_a_model_that_asks_its_ids_for_values_cannot_be_counted_without_memory() -> None:
    with torch.device("meta"):
        empty = _model("bart classifier")
    with pytest.raises(ModelError, match=r"BartForSequenceClassification could not run .* Meta"):
        cost(empty, sequence_length=TOKENS)


def _adapted(name: str, **settings: Any) -> Any:
    chosen = {"r": 3, "init_lora_weights": False} | settings
    return get_peft_model(_model(name), LoraConfig(**chosen))


TARGETS = {
    "bert": ["query", "value", "dense"],
    "deberta": ["query_proj", "key_proj", "value_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "t5": ["q", "v", "wo"],
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", TARGETS)
def test_adapters_beside_the_weights_and_merged_into_them(name: str, dora: bool) -> None:
    model = _adapted(name, target_modules=TARGETS[name], use_dora=dora)
    base = _counter_macs(_model(name), **_inputs(name))
    unmerged = cost(model, sequence_length=TOKENS, batch=BATCH, adapters="unmerged")
    assert unmerged.macs == _counter_macs(model, **_inputs(name)) > base
    assert unmerged.reference_macs == base
    assert sum(product.macs for product in unmerged.products if product.adapter is None) == base
    merged = cost(model, sequence_length=TOKENS, batch=BATCH)
    assert merged.options.adapters == "merged"
    assert merged.macs == merged.reference_macs == base
    assert cost(model.merge_and_unload(), sequence_length=TOKENS, batch=BATCH).products == merged.products


def test_an_adapter_that_was_merged_in_place_stays_merged() -> None:
    model = _adapted("bert", target_modules=TARGETS["bert"])
    model.merge_adapter()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    record = cost(model, sequence_length=TOKENS, batch=BATCH, adapters="unmerged")
    assert record.macs == record.reference_macs == _counter_macs(_model("bert"), **_inputs("bert"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(init_r=3, target_modules=["query"], total_step=10),
        BayesianLoraConfig(r=3, target_modules=["query", "value"]),
        LoraConfig(r=3, target_modules=["query"], modules_to_save=["classifier"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_adapters(config: Any) -> None:
    model = get_peft_model(_model("bert"), config)
    record = cost(model, sequence_length=TOKENS, batch=BATCH, adapters="unmerged")
    assert record.macs == _counter_macs(model, **_inputs("bert"))
    assert record.reference_macs == _counter_macs(_model("bert"), **_inputs("bert"))


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens(config: Callable[..., Any]) -> None:
    model = get_peft_model(_model("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    record = cost(model, sequence_length=TOKENS, batch=BATCH)
    assert record.options.adapters == "unmerged"
    assert record.macs == _counter_macs(model, **_inputs("llama")) > record.reference_macs
    assert record.reference_macs == _counter_macs(_model("llama"), **_inputs("llama"))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 10)),
        (nn.Conv2d(4, 6, (3, 2), stride=2), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 9, 8)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 6)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 6)),
        (nn.Conv3d(4, 2, 2), (1, 4, 3, 4, 5)),
    ],
    ids=str,
)
def test_convolutions(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(layer), torch.randn(shape)
    record = cost(model, inputs={"input": x}, sequence_length=1)
    assert record.macs == _counter_macs(model, input=x)
    assert [product.op for product in record.products] == ["conv"]
