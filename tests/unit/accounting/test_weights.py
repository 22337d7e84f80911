"""Bytes at rest: widths of weights, what a 4-bit base leaves alone, and which tensors are trained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rankbits.accounting.architectures.read import Head, find_config, read_shape
from rankbits.accounting.params import base_parameters, count, tensor_sizes
from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.spec import Convolution, Method, MethodSpec, ModelShape
from rankbits.accounting.weights import (
    adapter_sizes,
    nf4_bytes,
    trained_sizes,
    weights_bytes,
)

LLAMA3 = read_shape(find_config("llama3-8b"), name="llama3-8b", head=Head.LANGUAGE_MODEL)
MINILM = read_shape(find_config("minilm-l6"), name="minilm-l6", head=Head.CLASSIFICATION)
LORA = MethodSpec(Method.LORA, rank=8, targets=("query", "value"), trained_in_full=("classifier",))


def settings(**changes: object) -> TrainingSettings:
    return TrainingSettings(**{"batch": 1, "sequence_length": 8, **changes})  # type: ignore[arg-type]


def test_nf4_is_four_and_a_half_bits_and_a_table() -> None:
    assert nf4_bytes(64 * 256) == 64 * 256 * 4.5 / 8 + 64


def test_double_quantization_is_4_126953_bits_and_two_tables() -> None:
    assert nf4_bytes(64 * 256, double=True) == 64 * 256 * 4.126953125 / 8 + 64 + 1024 + 4


def test_broken_blocks_have_scales_of_their_own() -> None:
    assert nf4_bytes(65) == 33 + 2 * 4 + 64
    assert nf4_bytes(65, double=True) == 33 + 2 + 4 + 4 + 64 + 1024


@pytest.mark.parametrize(("base", "width"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_a_base_in_one_width(base: str, width: int) -> None:
    found = weights_bytes(LLAMA3, MethodSpec(Method.FULL), settings(base=base))
    assert found == width * base_parameters(LLAMA3)


def test_a_4_bit_base_keeps_tables_norms_and_head() -> None:
    spec = MethodSpec(Method.QLORA, rank=1, targets=("q_proj",))
    inner = [linear for linear in LLAMA3.linears() if linear.name != "lm_head"]
    kept = base_parameters(LLAMA3) - sum(linear.d_in * linear.d_out for linear in inner)
    expected = sum(nf4_bytes(linear.d_in * linear.d_out) for linear in inner) + kept * 2
    adapter = 32 * (4096 + 4096) * 4
    assert weights_bytes(LLAMA3, spec, settings(base="nf4", precision="bf16")) == expected + adapter
    assert kept == 2 * 128_256 * 4096 + 65 * 4096


def test_double_quantization_saves_0_373_bit_a_weight() -> None:
    spec = MethodSpec(Method.QLORA, rank=1, targets=("q_proj",))
    single, double = (weights_bytes(LLAMA3, spec, settings(base=base)) for base in ("nf4", "nf4-double"))
    weights = sum(linear.d_in * linear.d_out for linear in LLAMA3.linears() if linear.name != "lm_head")
    assert (single - double) * 8 / weights == pytest.approx(0.373, abs=0.001)


def test_adapters_are_fp32_beside_any_base_and_a_trained_head_is_there_twice() -> None:
    adapter = count(MINILM, LORA).adapter
    head = 384 * 2 + 2
    for base, width in (("fp32", 4), ("bf16", 2)):
        assert (
            weights_bytes(MINILM, LORA, settings(base=base)) == width * (base_parameters(MINILM) + head) + 4 * adapter
        )


def test_offsets_of_codes_are_a_byte_for_each_number_of_a_weight_that_has_a_quantizer() -> None:
    plain = MethodSpec(Method.BAYESIAN_LORA, targets=("query", "value"), sites=("weight", "input"))
    offset = replace(plain, compensated=True)

    def more(spec: MethodSpec, **changes: object) -> int:
        return weights_bytes(MINILM, spec, settings(**changes)) - weights_bytes(MINILM, plain, settings(**changes))

    assert more(offset) == 6 * 2 * 384 * 384
    # A base in 4 bits keeps its own grid, and without a quantizer of the weight there is no code.
    assert more(offset, base="nf4") == 0
    beside = replace(plain, sites=("input",))
    assert weights_bytes(MINILM, replace(beside, compensated=True), settings()) == weights_bytes(
        MINILM, beside, settings()
    )


def test_indices_of_sbora_are_64_bit_integers() -> None:
    lora, sbora = (
        weights_bytes(MINILM, MethodSpec(method, rank=8, targets=("query",)), settings())
        for method in (Method.LORA, Method.SBORA_FA)
    )
    assert lora - sbora == 6 * (4 * 8 * 384 - 8 * 8)


def test_a_convolution_has_a_weight_and_a_bias() -> None:
    assert tensor_sizes(Convolution("conv", 4, 6, (3, 3), groups=2)) == [4 * 6 // 2 * 9, 6]


@pytest.mark.parametrize(
    "spec",
    [
        LORA,
        MethodSpec(Method.BAYESIAN_LORA, rank=4, targets=("query",), sites=("weight", "up")),
        MethodSpec(Method.DORA, rank=4, targets=("query",)),
        MethodSpec(Method.MORA, rank=4, targets=("query",)),
        MethodSpec(Method.HOULSBY),
        MethodSpec(Method.PROMPT),
    ],
)
def test_adapters_and_modules_in_full_are_all_that_is_trained(spec: MethodSpec) -> None:
    assert sum(adapter_sizes(MINILM, spec)) + sum(trained_sizes(MINILM, spec)) == count(MINILM, spec).trainable


@pytest.mark.parametrize(
    "spec", [MethodSpec(Method.FULL), MethodSpec(Method.FEATURE_BASED), MethodSpec(Method.TOP_LAYER, layers=2)]
)
def test_what_is_trained_without_adapters(spec: MethodSpec) -> None:
    assert list(adapter_sizes(MINILM, spec)) in ([], [0])
    assert sum(trained_sizes(MINILM, spec)) == count(MINILM, spec).trainable


def test_a_tied_head_is_one_weight_unless_an_adapter_copies_it() -> None:
    tied: ModelShape = read_shape(find_config("smollm2-135m"), name="smollm2", head=Head.LANGUAGE_MODEL)
    assert sum(trained_sizes(tied, MethodSpec(Method.FULL))) == base_parameters(tied)
    spec = MethodSpec(Method.LORA, trained_in_full=("lm_head",))
    assert sum(trained_sizes(tied, spec)) == 49_152 * 576
    alone = MethodSpec(Method.FEATURE_BASED, trained_in_full=("lm_head",))
    assert sum(trained_sizes(tied, alone)) == count(tied, alone).trainable == 49_152 * 576
