"""Sizes of files, against files that PEFT and transformers really write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import sizes
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rankbits import BayesianLoraConfig
from rankbits.accounting.architectures.read import Head, read_shape
from rankbits.accounting.artefacts import artefact_bytes, checkpoint_bytes
from rankbits.accounting.params import count
from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.spec import Convolution, Granularity, Method, MethodSpec, ModelShape, Placement
from rankbits.errors import ModelError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:adapter 'default' is saved, but its gate schedule was never stepped"),
]
ALL_SITES = ("weight", "down", "diagonal", "up", "down_output", "diagonal_output", "output")
ADAPTER_FILE = "adapter_model.safetensors"


def bert() -> tuple[Any, ModelShape]:
    config = BertConfig(**sizes(hidden=16, layers=11, heads=2, wide=24, words=30))
    shape = read_shape(config.to_dict(), name="bert", head=Head.CLASSIFICATION)
    return BertForSequenceClassification(config), shape


def llama(*, tied: bool) -> tuple[Any, ModelShape]:
    small = sizes(hidden=16, layers=2, heads=2, wide=24, words=30)
    config = LlamaConfig(**small, num_key_value_heads=1, tie_word_embeddings=tied)
    return LlamaForCausalLM(config), read_shape(config.to_dict(), name="llama", head=Head.LANGUAGE_MODEL)


def test_a_lora_file_with_a_head(tmp_path: Path) -> None:
    model, shape = bert()
    config = LoraConfig(r=3, target_modules=["query", "value"], modules_to_save=["classifier"])
    get_peft_model(model, config).save_pretrained(str(tmp_path))
    spec = MethodSpec(Method.LORA, rank=3, targets=("query", "value"), trained_in_full=("classifier",))
    assert artefact_bytes(shape, spec) == (tmp_path / ADAPTER_FILE).stat().st_size


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("learn_rank", [True, False])
@pytest.mark.parametrize("sites", [ALL_SITES, ("weight", "up")])
def test_a_bayesian_lora_file(tmp_path: Path, rank: int, learn_rank: bool, sites: tuple[str, ...]) -> None:
    model, shape = llama(tied=True)
    config = BayesianLoraConfig(
        r=rank, target_modules=["q_proj", "o_proj"], learn_rank=learn_rank, quantizers=list(sites)
    )
    get_peft_model(model, config).save_pretrained(str(tmp_path))
    targets = ("q_proj", "o_proj")
    spec = MethodSpec(Method.BAYESIAN_LORA, rank=rank, targets=targets, sites=sites, learn_rank=learn_rank)
    assert artefact_bytes(shape, spec) == (tmp_path / ADAPTER_FILE).stat().st_size


@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("all_codes", [False, True])
def test_a_file_with_shared_inputs_and_fine_ranges(
    tmp_path: Path, all_codes: bool, compensated: bool, tied: bool, granularity: Granularity, placement: Placement
) -> None:
    model, shape = llama(tied=True)
    targets, sites = ("q_proj", "k_proj", "up_proj"), ("weight", "output", "input")
    config = BayesianLoraConfig(
        r=3,
        target_modules=list(targets),
        quantizers=list(sites),
        granularity=granularity.value,
        input_granularity=Granularity.GROUP.value if granularity is Granularity.GROUP else Granularity.TENSOR.value,
        activation_ranges="affine" if all_codes else "fitted",
        group_size=8,
        placement=placement.value,
        tie_groups="fused" if tied else None,
        rounding="compensated" if compensated else "nearest",
        code_range="full" if all_codes else "narrow",
    )
    get_peft_model(model, config).save_pretrained(str(tmp_path))
    spec = MethodSpec(
        Method.BAYESIAN_LORA,
        rank=3,
        targets=targets,
        sites=sites,
        granularity=granularity,
        input_granularity=granularity if granularity is Granularity.GROUP else Granularity.TENSOR,
        affine_inputs=all_codes,
        group_size=8,
        placement=placement,
        tie_groups=tied,
        compensated=compensated,
        all_codes=all_codes,
    )
    assert artefact_bytes(shape, spec) == (tmp_path / ADAPTER_FILE).stat().st_size


def test_a_file_with_quantizers_of_attention(tmp_path: Path) -> None:
    model, shape = llama(tied=True)
    targets = ("q_proj", "k_proj", "v_proj", "up_proj")
    config = BayesianLoraConfig(r=3, target_modules=list(targets), quantizers=["weight"], quantize_attention=True)
    get_peft_model(model, config).save_pretrained(str(tmp_path))
    spec = MethodSpec(Method.BAYESIAN_LORA, rank=3, targets=targets, sites=("weight",), quantize_attention=True)
    assert artefact_bytes(shape, spec) == (tmp_path / ADAPTER_FILE).stat().st_size


def test_a_whole_model(tmp_path: Path) -> None:
    for name, (model, shape) in {"bert": bert(), "tied": llama(tied=True), "untied": llama(tied=False)}.items():
        model.save_pretrained(str(tmp_path / name))
        written = (tmp_path / name / "model.safetensors").stat().st_size
        assert artefact_bytes(shape, MethodSpec(Method.FULL)) == written, name


def test_a_whole_model_in_half_precision_has_two_bytes_less_a_weight() -> None:
    _, shape = bert()
    whole, half = (artefact_bytes(shape, MethodSpec(Method.FULL), dtype=dtype) for dtype in ("F32", "F16"))
    parameters = count(shape, MethodSpec(Method.FULL)).trainable
    # Headers differ in the digits of their offsets.
    assert whole - half == pytest.approx(2 * parameters, abs=1500)


def test_other_adapters_hold_what_they_train_and_a_header() -> None:
    _, shape = bert()
    spec = MethodSpec(Method.SBORA_FA, rank=3, targets=("query",), trained_in_full=("classifier",))
    values = count(shape, spec).trainable * 4 + count(shape, spec).stored_indices * 8
    assert values < artefact_bytes(shape, spec) < values + 5000


def test_a_convolution_is_saved_with_its_bias() -> None:
    with_bias, without = (
        ModelShape("c", "c", (Convolution("conv", 4, 6, (3,), bias=bias),), 4, 1, None, 0, ()) for bias in (True, False)
    )
    full = MethodSpec(Method.FULL)
    header = len('"conv.bias":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},')
    assert artefact_bytes(with_bias, full) - artefact_bytes(without, full) == pytest.approx(6 * 4 + header, abs=10)


def test_a_checkpoint_adds_the_states_wherever_they_are() -> None:
    _, shape = llama(tied=True)
    spec = MethodSpec(Method.LORA, rank=3, targets=("q_proj",))
    settings = TrainingSettings(batch=1, sequence_length=8)
    adapter = count(shape, spec).trainable
    assert checkpoint_bytes(shape, spec, settings) == artefact_bytes(shape, spec) + 8 * adapter
    half = TrainingSettings(batch=1, sequence_length=8, base="bf16")
    full = MethodSpec(Method.FULL)
    states = 4 * count(shape, full).trainable
    assert checkpoint_bytes(shape, full, half) == artefact_bytes(shape, full, dtype="BF16") + states


def test_an_unknown_dtype_is_refused() -> None:
    _, shape = llama(tied=True)
    with pytest.raises(ModelError, match="dtype: given 'INT8', expected F32, BF16 or F16"):
        artefact_bytes(shape, MethodSpec(Method.FULL), dtype="INT8")
