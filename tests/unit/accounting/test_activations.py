"""What a pass keeps: closed forms of one block, and how it grows with batch, length, rank and checkpointing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rankbits.accounting.activations import forward_bytes
from rankbits.accounting.architectures.read import Head, find_config, read_shape
from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.spec import Convolution, Method, MethodSpec, ModelShape

SITES = ("weight", "down", "diagonal", "up", "down_output", "diagonal_output", "output")
D, FFN, H, T, B, L = 384, 1536, 12, 16, 2, 6
N = B * T
MINILM = read_shape(find_config("minilm-l6"), name="minilm-l6", head=Head.NONE)
SMOLLM2 = read_shape(find_config("smollm2-135m"), name="smollm2", head=Head.LANGUAGE_MODEL)
LORA = MethodSpec(Method.LORA, rank=8, targets=("query", "key", "value"))


def settings(**changes: object) -> TrainingSettings:
    return TrainingSettings(**{"batch": B, "sequence_length": T, "dropout": False, **changes})  # type: ignore[arg-type]


def kept(shape: ModelShape, spec: MethodSpec, **changes: object) -> int:
    return forward_bytes(shape, spec, settings(**changes)).kept


def test_lora_on_bert_keeps_what_its_gradients_need() -> None:
    attention = 5 * D + 3 * 8 + H  # x, q, k, v, the output; three times h; the softmax's sums
    feed_forward = 2 * (D + 2) + FFN  # inputs, means and deviations of both norms; the activation's input
    pooler, loss = B * D * 4, B * 8 + 4
    assert kept(MINILM, LORA) == L * N * (attention + feed_forward) * 4 + pooler + loss


def test_full_finetuning_keeps_every_input_of_a_weight_too() -> None:
    added = L * N * (D + FFN) * 4  # what o and the two feed-forward layers read; o's is the attention's output
    embeddings = N * (D + 2) * 4 + (N + T) * 8
    pooled_from = N * D * 4
    assert kept(MINILM, MethodSpec(Method.FULL)) - kept(MINILM, LORA) == (
        added + embeddings + pooled_from - L * N * 3 * 8 * 4
    )


def test_nothing_is_kept_before_the_first_adapter() -> None:
    top = replace(LORA, targets=rf".*layer\.{L - 1}\.attention\.self\.(query|key|value)")
    one_block = kept(MINILM, LORA) - kept(MINILM, replace(LORA, targets=r".*layer\.[1-5]\..*\.(query|key|value)"))
    assert kept(MINILM, top) == kept(MINILM, LORA) - (L - 1) * one_block


def test_unadapted_blocks_on_the_way_back_keep_no_input_for_frozen_weights() -> None:
    first = kept(MINILM, replace(LORA, targets=r".*layer\.0\.attention\.self\.query"))
    assert first == kept(MINILM, LORA) - (L - 1) * N * (D + 3 * 8) * 4 - N * 2 * 8 * 4


def test_feature_based_training_keeps_the_heads_input_alone() -> None:
    shape = read_shape(find_config("minilm-l6"), name="minilm-l6", head=Head.CLASSIFICATION)
    assert kept(shape, MethodSpec(Method.FEATURE_BASED)) == B * (2 * 4 + 8) + 4


@pytest.mark.parametrize("spec", [LORA, MethodSpec(Method.FULL), replace(LORA, method=Method.BAYESIAN_LORA)])
def test_kept_bytes_grow_in_proportion_to_the_batch(spec: MethodSpec) -> None:
    two, four, six = (kept(MINILM, spec, batch=batch) for batch in (2, 4, 6))
    assert six - four == four - two > 0


def test_fused_attention_grows_with_the_length_and_unfused_with_its_square() -> None:
    fused = [kept(MINILM, LORA, sequence_length=length) for length in (16, 32, 48)]
    assert fused[2] - fused[1] == fused[1] - fused[0]
    eager = [kept(MINILM, LORA, sequence_length=length, attention="eager") for length in (16, 32, 48)]
    assert eager[2] - 2 * eager[1] + eager[0] == 2 * L * B * H * 16**2 * 4


def test_dropout_keeps_three_maps_of_scores_on_a_cpu_and_none_on_cuda() -> None:
    noise = 2 * L * N * D * 4 + B * D * 4
    on_cpu = kept(MINILM, LORA, dropout=True) - kept(MINILM, LORA)
    assert on_cpu == noise + L * (3 * B * H * T * T - N * D - N * H) * 4
    assert kept(MINILM, LORA, dropout=True, device="cuda") - kept(MINILM, LORA) == noise


def test_encoders_have_dropout_and_decoders_have_none_unless_told() -> None:
    assert kept(MINILM, LORA, dropout=None) == kept(MINILM, LORA, dropout=True)
    lora = MethodSpec(Method.LORA)
    assert kept(SMOLLM2, lora, dropout=None) == kept(SMOLLM2, lora, dropout=False)


def test_grouped_queries_keep_their_few_keys_and_values_only_when_fused() -> None:
    lora = MethodSpec(Method.LORA, targets=("q_proj",))
    fused, eager = (kept(SMOLLM2, lora, attention=attention) for attention in ("sdpa", "eager"))
    # Without the kernel: keys and values for each of 9 heads instead of 3, a map of scores, no output and no sums.
    assert eager - fused == 30 * (2 * (576 - 192) * N + B * 9 * T * T - (576 + 9) * N) * 4


def test_checkpointing_keeps_block_inputs_and_one_block() -> None:
    whole, checkpointed = (kept(MINILM, MethodSpec(Method.FULL), checkpointing=on) for on in (False, True))
    block = N * (6 * D + H + 2 * (D + 2) + 2 * FFN) * 4
    assert whole - checkpointed == pytest.approx((L - 1) * block - L * N * D * 4, rel=0.1)
    assert checkpointed > L * N * D * 4


def test_the_loss_over_a_vocabulary_is_apart_and_in_fp32() -> None:
    lora = MethodSpec(Method.LORA)
    for precision in ("fp32", "bf16"):
        assert forward_bytes(SMOLLM2, lora, settings(precision=precision)).logits == N * 49_152 * 4
    assert forward_bytes(MINILM, LORA, settings()).logits == 0


def test_virtual_tokens_lengthen_the_sequence_and_a_prefix_the_keys() -> None:
    prompt = MethodSpec(Method.PROMPT, virtual_tokens=T, trained_in_full=("embeddings",))
    none = MethodSpec(Method.LORA, targets=("query",), trained_in_full=("embeddings",))
    assert forward_bytes(MINILM, prompt, settings()).kept > 1.5 * forward_bytes(MINILM, none, settings()).kept
    prefix = MethodSpec(Method.PREFIX, virtual_tokens=5, trained_in_full=("embeddings",))
    longer = replace(prefix, virtual_tokens=6)
    assert kept(MINILM, longer) - kept(MINILM, prefix) == L * B * 2 * D * 4


@pytest.mark.parametrize("method", [m for m in Method if m not in {Method.FEATURE_BASED, Method.TOP_LAYER}])
def test_every_method_has_an_estimate(method: Method) -> None:
    spec = MethodSpec(method, trained_in_full=("word_embeddings",), sites=SITES)
    found = forward_bytes(MINILM, spec, settings())
    assert found.kept > L * N * FFN * 4
    assert found.temporary > 0
    assert found.largest >= N * FFN * 4


def test_unfused_quantizers_write_more_and_keep_the_same() -> None:
    spec = MethodSpec(Method.BAYESIAN_LORA, rank=8, targets=("query",), sites=SITES)
    fused, eager = (forward_bytes(MINILM, spec, settings(compiled=compiled)) for compiled in (True, False))
    assert eager.kept == fused.kept
    assert eager.temporary - fused.temporary == 3 * L * (D * D + N * D) * 4


def test_half_precision_halves_what_products_keep() -> None:
    full = MethodSpec(Method.FULL)
    assert kept(MINILM, full, precision="bf16", base="bf16") == pytest.approx(kept(MINILM, full) / 2, rel=0.02)
    copies = kept(MINILM, full, precision="bf16") - kept(MINILM, full, precision="bf16", base="bf16")
    assert copies > sum(linear.d_in * linear.d_out for linear in MINILM.linears()) * 2


def test_deberta_keeps_indices_of_what_it_gathers() -> None:
    shape = read_shape(find_config("deberta-v3-base"), name="deberta", head=Head.NONE)
    lora = MethodSpec(Method.LORA, targets=("query_proj",))
    attention = "eager"
    plain = replace(shape, parts=tuple(_without_positions(part) for part in shape.parts))
    assert (
        kept(shape, lora, attention=attention) - kept(plain, lora, attention=attention) == 12 * 2 * B * 12 * T * T * 8
    )


def _without_positions(part: object) -> object:
    is_attention = hasattr(part, "c2p")
    return replace(part, position_rows=0, c2p=False, p2c=False) if is_attention else part  # type: ignore[type-var]


def test_a_convolution_that_is_trained_keeps_its_wider_side() -> None:
    shape = ModelShape("c", "c", (Convolution("conv", 4, 6, (3,)), MINILM.linears()[0]), 4, 1, None, 0, ())
    assert kept(shape, MethodSpec(Method.FULL)) == N * 6 * 4 + N * D * 4 + B * 8 + 4
