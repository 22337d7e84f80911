"""Parameter counts and targets: published numbers, and what live models of PEFT and of ours really train."""

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from tiny_models import sizes
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    LlamaConfig,
    T5Config,
)

from rankbits.accounting.architectures.read import Head, find_config, read_shape
from rankbits.accounting.params import ParameterCount, base_parameters, count, targeted
from rankbits.accounting.spec import Convolution, Linear, Method, MethodSpec, ModelShape, Norm, Table
from rankbits.errors import ModelError
from rankbits.tuners.bayesian_lora import BayesianLoraConfig

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

QKV = ("query_proj", "key_proj", "value_proj")
SEVEN = ("weight", "down", "diagonal", "up", "down_output", "diagonal_output", "output")
BERT = BertConfig(**sizes(hidden=32, layers=3, heads=4, wide=48, words=50), max_position_embeddings=20)
TWO_LAYERS = sizes(hidden=32, layers=2, heads=4, wide=48, words=50)
LLAMA = LlamaConfig(**TWO_LAYERS, num_key_value_heads=2, tie_word_embeddings=False)
T5 = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, tie_word_embeddings=True)
DEBERTA = DebertaV2Config(
    **TWO_LAYERS,
    relative_attention=True,
    position_buckets=8,
    share_att_key=True,
    pos_att_type=["c2p", "p2c"],
    norm_rel_ebd="layer_norm",
)


def _published(name: str, head: Head = Head.NONE) -> ModelShape:
    return read_shape(find_config(name), name=name, head=head)


def _read(config, head: Head) -> ModelShape:
    return read_shape(config.to_dict(), name="tiny", head=head)


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _causal(peft_config) -> int:
    with torch.device("meta"):
        return _trained(get_peft_model(AutoModelForCausalLM.from_config(LLAMA), peft_config))


@pytest.mark.parametrize(
    ("name", "head", "parameters"),
    [
        ("llama-7b", Head.LANGUAGE_MODEL, 6_738_415_616),
        ("llama-13b", Head.LANGUAGE_MODEL, 13_015_864_320),
        ("llama3-8b", Head.LANGUAGE_MODEL, 8_030_261_248),
        ("deberta-v3-base", Head.CLASSIFICATION, 184_423_682),
        ("mt0-large", Head.LANGUAGE_MODEL, 1_231_940_608 - 2_359_296),
    ],
)
def test_base_parameters_of_published_models(name: str, head: Head, parameters: int):
    assert base_parameters(_published(name, head)) == parameters


@pytest.mark.parametrize(
    ("config", "head", "auto"),
    [
        (BERT, Head.CLASSIFICATION, AutoModelForSequenceClassification),
        (DEBERTA, Head.CLASSIFICATION, AutoModelForSequenceClassification),
        (LLAMA, Head.LANGUAGE_MODEL, AutoModelForCausalLM),
        (T5, Head.LANGUAGE_MODEL, AutoModelForSeq2SeqLM),
    ],
)
def test_full_fine_tuning_trains_what_the_live_model_has(config, head: Head, auto):
    with torch.device("meta"):
        live = auto.from_config(config)
    shape = _read(config, head)
    assert count(shape, MethodSpec(Method.FULL)) == ParameterCount(base=_trained(live))
    assert base_parameters(shape) == _trained(live)


def test_parameters_of_each_kind_of_part():
    parts = (
        Table("words", 50, 8),
        Norm("norm", 8),
        Norm("rms", 8, bias=False),
        Linear("up", 8, 32),
        Linear("down", 32, 8, bias=False),
        Linear("head", 8, 50, bias=False, tied_to="words"),
        Convolution("conv", 8, 16, (3, 5), groups=2),
        Convolution("plain", 8, 16, (3,), bias=False),
    )
    shape = ModelShape("m", "m", parts, 8, 1, None, 50, ())
    grouped = 16 * 4 * 15 + 16
    assert base_parameters(shape) == 400 + 16 + 8 + (256 + 32) + 256 + grouped + 8 * 16 * 3


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear", r"model\.layers\.1\..*_proj", None])
@pytest.mark.parametrize("method", [Method.LORA, Method.DORA])
def test_lora_and_dora_train_what_peft_trains(targets, method: Method):
    given = list(targets) if isinstance(targets, tuple) else targets
    config = LoraConfig(
        r=3, target_modules=given, use_dora=method is Method.DORA, task_type=TaskType.CAUSAL_LM, modules_to_save=None
    )
    spec = MethodSpec(method, rank=3, targets=targets)
    assert count(_read(LLAMA, Head.LANGUAGE_MODEL), spec).trainable == _causal(config)


def test_adalora_trains_what_peft_trains():
    config = AdaLoraConfig(
        init_r=6, target_r=3, total_step=100, tinit=10, tfinal=10, target_modules=["q_proj", "down_proj"]
    )
    found = count(
        _read(LLAMA, Head.LANGUAGE_MODEL), MethodSpec(Method.ADALORA, rank=6, targets=("q_proj", "down_proj"))
    )
    assert found.trainable == _causal(config)
    assert found == ParameterCount(adapter=2 * 6 * (64 + 80), diagonal=2 * 2 * 6)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        (Method.PREFIX, PrefixTuningConfig(num_virtual_tokens=7, task_type=TaskType.CAUSAL_LM)),
        (Method.PROMPT, PromptTuningConfig(num_virtual_tokens=7, task_type=TaskType.CAUSAL_LM)),
    ],
)
def test_virtual_tokens_of_a_decoder(method: Method, config):
    found = count(_read(LLAMA, Head.LANGUAGE_MODEL), MethodSpec(method, virtual_tokens=7))
    assert found == ParameterCount(adapter=_causal(config))


@pytest.mark.parametrize(
    ("method", "config"),
    [
        (Method.PREFIX, PrefixTuningConfig(num_virtual_tokens=7, task_type=TaskType.SEQ_2_SEQ_LM)),
        (Method.PROMPT, PromptTuningConfig(num_virtual_tokens=7, task_type=TaskType.SEQ_2_SEQ_LM)),
    ],
)
def test_virtual_tokens_of_two_stacks(method: Method, config):
    with torch.device("meta"):
        live = _trained(get_peft_model(AutoModelForSeq2SeqLM.from_config(T5), config))
    assert count(_read(T5, Head.LANGUAGE_MODEL), MethodSpec(method, virtual_tokens=7)).trainable == live


@pytest.mark.parametrize("learn_rank", [True, False])
@pytest.mark.parametrize("quantizers", [None, ["weight", "input"]])
@pytest.mark.parametrize("targets", [("query", "key"), "all-linear"])
def test_bayesian_lora_trains_what_our_tuner_trains(learn_rank: bool, quantizers, targets):
    peft_config = BayesianLoraConfig(
        r=5,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        task_type=TaskType.SEQ_CLS,
        learn_rank=learn_rank,
        quantizers=quantizers,
        modules_to_save=["classifier"],
    )
    model = get_peft_model(AutoModelForSequenceClassification.from_config(BERT), peft_config)
    spec = MethodSpec(
        Method.BAYESIAN_LORA,
        rank=5,
        targets=targets,
        learn_rank=learn_rank,
        sites=tuple(quantizers or SEVEN),
        trained_in_full=("classifier",),
    )
    found = count(_read(BERT, Head.CLASSIFICATION), spec)
    assert found.trainable == _trained(model)
    assert found.head == 32 * 2 + 2


def test_bayesian_lora_by_group():
    spec = MethodSpec(Method.BAYESIAN_LORA, rank=8, targets=QKV, sites=SEVEN)
    found = count(_published("deberta-v3-base"), spec)
    assert found == ParameterCount(adapter=442_368, diagonal=288, gates=252 + 1008, ranges=252)
    assert (found.paper, found.trainable) == (442_368, 444_168)


@pytest.mark.parametrize(
    ("method", "sizes", "parameters"),
    [
        (Method.SBORA_FA, {}, 55_296),
        (Method.SBORA_FB, {}, 55_296),
        (Method.QSBORA_FA, {}, 55_296),
        (Method.QSBORA_FB, {}, 55_296),
        (Method.MULTI_SBORA, {}, 55_296),
        (Method.MORA, {}, 109_512),
        (Method.DYLORA, {}, 110_592),
        (Method.QLORA, {}, 110_592),
        (Method.QDORA, {}, 110_592 + 18 * 384),
        (Method.HOULSBY, {"width": 24}, 226_080),
        (Method.PFEIFFER, {"width": 24}, 113_040),
        (Method.PARALLEL, {"width": 24}, 113_040),
        (Method.PREFIX, {"virtual_tokens": 10}, 10 * 2 * 6 * 384),
        (Method.PROMPT, {"virtual_tokens": 10}, 10 * 384),
    ],
)
def test_every_method_on_minilm(method: Method, sizes: dict, parameters: int):
    spec = MethodSpec(method, rank=8, targets=("query", "key", "value"), **sizes)
    assert count(_published("minilm-l6"), spec).trainable == parameters


def test_sbora_follows_the_side_it_trains_and_stores_its_indices():
    shape = _published("llama3-8b")
    fa = count(shape, MethodSpec(Method.SBORA_FA, rank=32, targets=("k_proj",)))
    fb = count(shape, MethodSpec(Method.SBORA_FB, rank=32, targets=("k_proj",)))
    assert (fa.adapter, fb.adapter) == (32 * 32 * 1024, 32 * 32 * 4096)
    assert fa.stored_indices == fb.stored_indices == 32 * 32
    assert fa.trainable == fa.adapter


def test_bert_base_houlsby_and_pfeiffer():
    shape = _published("bert-base")
    assert count(shape, MethodSpec(Method.HOULSBY)).trainable == 1_789_056
    assert count(shape, MethodSpec(Method.PFEIFFER)).trainable == 894_528


def test_modules_trained_in_full_are_added_to_any_adapter():
    shape = _published("deberta-v3-base", Head.CLASSIFICATION)
    spec = MethodSpec(Method.LORA, rank=8, targets=QKV, trained_in_full=("pooler", "classifier"))
    assert count(shape, spec) == ParameterCount(adapter=442_368, head=768 * 769 + 2 * 769)
    with pytest.raises(ModelError, match="'pooled' matches no module of deberta-v3-base; it has LayerNorm"):
        count(shape, MethodSpec(Method.LORA, targets=QKV, trained_in_full=("pooled",)))


def test_a_tied_head_trained_in_full_becomes_a_copy_of_its_own():
    shape = _read(T5, Head.LANGUAGE_MODEL)
    spec = MethodSpec(Method.LORA, rank=2, targets=("q",), trained_in_full=("lm_head",))
    assert count(shape, spec).head == 50 * 32


def test_feature_based_trains_the_head_and_top_layer_blocks_besides():
    shape = _read(BERT, Head.CLASSIFICATION)
    block = 4 * 32 * 33 + 2 * 64 + 32 * 48 + 48 + 48 * 32 + 32
    assert count(shape, MethodSpec(Method.FEATURE_BASED)) == ParameterCount(head=66)
    assert count(shape, MethodSpec(Method.TOP_LAYER, layers=1)) == ParameterCount(head=66, base=block)
    assert count(shape, MethodSpec(Method.TOP_LAYER, layers=3)) == ParameterCount(head=66, base=3 * block)
    own = MethodSpec(Method.TOP_LAYER, layers=2, trained_in_full=("pooler", "classifier"))
    assert count(shape, own) == ParameterCount(head=66 + 32 * 33, base=2 * block)
    for layers in (-1, 4):
        with pytest.raises(ModelError, match=rf"layers: given {layers} top blocks of tiny, expected 0 to 3"):
            count(shape, MethodSpec(Method.TOP_LAYER, layers=layers))
    with pytest.raises(ModelError, match="feature-based trains the head, which tiny does not have"):
        count(_read(BERT, Head.NONE), MethodSpec(Method.FEATURE_BASED))


def test_top_blocks_are_those_of_the_decoder_and_heads_have_their_names():
    shape = _read(T5, Head.CLASSIFICATION)
    with torch.device("meta"):
        live = AutoModelForSequenceClassification.from_config(T5)
    decoder = sum(p.numel() for n, p in live.named_parameters() if "decoder.block.1." in n)
    head = sum(p.numel() for n, p in live.named_parameters() if "classification_head" in n)
    assert count(shape, MethodSpec(Method.TOP_LAYER, layers=1)) == ParameterCount(head=head, base=decoder)


@pytest.mark.parametrize(
    "targets", [("query",), ("layer.1.output.dense",), r".*layer\.[02]\..*(key|value)", "all-linear"]
)
@pytest.mark.parametrize("saved", [("classifier",), ("classifier", "pooler")])
def test_targets_match_as_in_peft(targets, saved):
    given = list(targets) if isinstance(targets, tuple) else targets
    config = LoraConfig(r=2, target_modules=given, modules_to_save=list(saved), task_type=TaskType.SEQ_CLS)
    with torch.device("meta"):
        model = get_peft_model(AutoModelForSequenceClassification.from_config(BERT), config)
    live = [name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")]
    spec = MethodSpec(Method.LORA, rank=2, targets=targets, trained_in_full=saved)
    shape = _read(BERT, Head.CLASSIFICATION)
    assert sorted(linear.name for linear in targeted(shape, spec)) == sorted(live)
    assert count(shape, spec).trainable == _trained(model)


def test_usual_targets_are_taken_where_none_are_given():
    found = targeted(_published("roberta-base"), MethodSpec(Method.LORA))
    assert {linear.name.rsplit(".", 1)[-1] for linear in found} == {"query", "value"}
    assert len(found) == 24


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("query", "qerry"), r"targets: 'qerry' matches no linear layer of bert-base; it has dense, key, query, value"),
        ("que.*y", r"targets: 'que\.\*y' matches no linear layer"),
        ("(", r"targets: '\(' is not a regular expression"),
        ((), r"targets: none are given and bert-base has no usual ones"),
        ((("query", "word_embeddings")), r"targets: 'word_embeddings' matches no linear layer"),
        (r".*(query|word_embeddings)", r"word_embeddings of bert-base is a table, expected linear layers"),
    ],
)
def test_targets_that_match_nothing_or_the_wrong_thing(targets, message: str):
    with pytest.raises(ModelError, match=message):
        targeted(_published("bert-base"), MethodSpec(Method.LORA, targets=targets))


def test_methods_without_targets_have_none():
    for method in (Method.FULL, Method.PREFIX, Method.PROMPT, Method.HOULSBY, Method.TOP_LAYER, Method.FEATURE_BASED):
        assert targeted(_published("bert-base"), MethodSpec(method, targets=("nothing",))) == []


@pytest.mark.parametrize(
    ("method", "rank", "allowed"),
    [
        (Method.LORA, 0, "at least 1"),
        (Method.BAYESIAN_LORA, 385, "1 to 384"),
        (Method.SBORA_FA, 1537, "1 to 1536"),
        (Method.SBORA_FB, 385, "1 to 384"),
        (Method.MORA, 0, "at least 1"),
    ],
)
def test_a_rank_the_layer_cannot_have(method: Method, rank: int, allowed: str):
    spec = MethodSpec(method, rank=rank, targets=("layer.0.output.dense",))
    with pytest.raises(ModelError, match=rf"rank: given {rank} for {method.value} on encoder.*, expected {allowed}"):
        count(_published("minilm-l6"), spec)


@pytest.mark.parametrize("method", [Method.PREFIX, Method.PROMPT])
def test_virtual_tokens_are_at_least_one(method: Method):
    with pytest.raises(ModelError, match=rf"virtual_tokens: given 0 for {method.value}, expected at least 1"):
        count(_published("bert-base"), MethodSpec(method, virtual_tokens=0))
