"""Memory, item by item, against closed forms and against what is really allocated."""

from __future__ import annotations

import pytest

from rankbits.accounting.activations import forward_bytes
from rankbits.accounting.architectures.read import Head, find_config, read_shape
from rankbits.accounting.memory import (
    RUNTIME_COMPILER,
    RUNTIME_CPU,
    RUNTIME_CUDA,
    inference_memory,
    kv_cache_bytes,
    runtime_bytes,
    training_memory,
)
from rankbits.accounting.rules_of_thumb import GB
from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.spec import Linear, Method, MethodSpec, ModelShape, Norm, Rows, Table

SITES = ("weight", "down", "diagonal", "up", "down_output", "diagonal_output", "output")
FULL = MethodSpec(Method.FULL)
LORA = MethodSpec(Method.LORA, rank=2, targets=("up",))


def tiny(vocabulary: int = 10) -> ModelShape:
    """A decoder of one linear layer and an untied head."""
    parts = (
        Table("embed", vocabulary, 4),
        Norm("norm", 4, bias=False),
        Linear("up", 4, 6, bias=False),
        Linear("lm_head", 6, vocabulary, bias=False, rows=Rows.HEAD, op="head"),
    )
    return ModelShape("tiny", "tiny", parts, 4, 1, None, vocabulary, ("up",), decoder=True)


def llama3(head: Head = Head.LANGUAGE_MODEL) -> ModelShape:
    return read_shape(find_config("llama3-8b"), name="llama3-8b", head=head)


def settings(**changes: object) -> TrainingSettings:
    return TrainingSettings(**{"batch": 2, "sequence_length": 3, **changes})  # type: ignore[arg-type]


def test_full_finetuning_holds_sixteen_bytes_a_parameter() -> None:
    found = training_memory(tiny(), FULL, settings())
    parameters = 40 + 4 + 24 + 60
    assert (found.weights, found.gradients, found.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)


def test_lora_trains_its_own_matrices_alone() -> None:
    found = training_memory(tiny(), LORA, settings())
    adapter = 2 * (4 + 6)
    assert (found.weights, found.gradients, found.optimizer) == (4 * (128 + adapter), 4 * adapter, 8 * adapter)


def test_logits_are_log_probabilities_and_two_gradients_of_every_position() -> None:
    assert training_memory(tiny(vocabulary=1000), LORA, settings()).logits == 3 * (2 * 3) * 1000 * 4
    assert training_memory(tiny(vocabulary=1000), LORA, settings(precision="bf16")).logits == 3 * 6 * 1000 * 4


def test_the_total_is_the_sum_of_the_items_without_the_host() -> None:
    found = training_memory(
        llama3(), FULL, settings(optimizer="paged-adamw-8bit", device="cuda", base="bf16", precision="bf16")
    )
    assert set(found.items) == {
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "workspace",
        "runtime",
        "reused",
    }
    assert found.total == sum(found.items.values())
    assert found.host > 2 * 8_000_000_000


def test_holes_are_part_of_the_temporaries_and_go_with_a_fixed_threshold() -> None:
    kept, without = (
        training_memory(tiny(), LORA, settings(batch=64, fixed_mmap_threshold=fixed)) for fixed in (False, True)
    )
    on_cuda = training_memory(tiny(), LORA, settings(batch=64, device="cuda"))
    temporary = forward_bytes(tiny(), LORA, settings(batch=64)).temporary
    assert kept.workspace - without.workspace == temporary * 3 // 5
    assert without.workspace == on_cuda.workspace
    assert kept.reused == on_cuda.reused == 0
    assert kept.activations == without.activations


@pytest.mark.parametrize("batch", [1, 1000])
def test_where_pages_come_back_gradients_and_activations_are_never_whole_at_once(batch: int) -> None:
    found = training_memory(tiny(), FULL, settings(batch=batch, fixed_mmap_threshold=True))
    backward = found.activations + found.logits
    assert found.gradients + backward + found.reused == max(found.gradients, backward)


def test_blocks_of_32_mib_leave_no_holes() -> None:
    small, large = (
        training_memory(tiny(), LORA, settings(batch=2, sequence_length=length, fixed_mmap_threshold=False))
        for length in (2**17, 2**22)
    )
    holes = [
        found.workspace
        - training_memory(tiny(), LORA, settings(batch=2, sequence_length=n, fixed_mmap_threshold=True)).workspace
        for found, n in ((small, 2**17), (large, 2**22))
    ]
    assert holes[0] > 0
    assert holes[1] == 0


@pytest.mark.parametrize(
    ("spec", "changes", "expected"),
    [
        (LORA, {}, RUNTIME_CPU),
        (MethodSpec(Method.BAYESIAN_LORA, sites=SITES), {}, RUNTIME_CPU + RUNTIME_COMPILER),
        (MethodSpec(Method.BAYESIAN_LORA, sites=SITES), {"compiled": False}, RUNTIME_CPU),
        (MethodSpec(Method.BAYESIAN_LORA), {}, RUNTIME_CPU),
        (MethodSpec(Method.BAYESIAN_LORA, sites=SITES), {"device": "cuda"}, RUNTIME_CUDA),
    ],
)
def test_the_runtime_is_the_process_or_the_device_context(
    spec: MethodSpec, changes: dict[str, object], expected: int
) -> None:
    assert runtime_bytes(spec, settings(**changes)) == expected
    assert training_memory(tiny(), MethodSpec(**{**vars(spec), "rank": 2}), settings(**changes)).runtime == expected


def test_the_cache_of_grouped_query_attention() -> None:
    assert kv_cache_bytes(llama3(), 3, 100, element_bytes=2) == 2 * 32 * 3 * 100 * 8 * 128 * 2


def test_a_window_bounds_the_cache() -> None:
    config = {**find_config("qwen2-7b"), "use_sliding_window": True, "sliding_window": 50, "max_window_layers": 20}
    shape = read_shape(config, name="windowed", head=Head.LANGUAGE_MODEL)
    assert kv_cache_bytes(shape, 1, 100, element_bytes=2) == 2 * 4 * 128 * 2 * (20 * 100 + 8 * 50)


def test_an_encoder_has_no_cache() -> None:
    shape = read_shape(find_config("bert-base"), name="bert-base", head=Head.CLASSIFICATION)
    assert kv_cache_bytes(shape, 1, 100, element_bytes=2) == 0


def test_inference_has_weights_a_cache_and_the_last_logits() -> None:
    found = inference_memory(llama3(), FULL, settings(batch=1, sequence_length=2048, precision="bf16", base="bf16"))
    assert (found.gradients, found.optimizer) == (0, 0)
    assert found.weights == 2 * 8_030_261_248
    assert found.activations == 2 * 32 * 2048 * 8 * 128 * 2
    assert found.logits == 128_256 * 2
    assert found.workspace == 2048 * (3 * 14336 + 2 * 4096) * 2


def test_inference_has_no_dropout_and_an_ungated_activation_is_there_twice() -> None:
    shape = read_shape(find_config("bert-base"), name="bert-base", head=Head.CLASSIFICATION)
    found = inference_memory(shape, FULL, settings(batch=1, sequence_length=512))
    assert found.workspace == 512 * (2 * 3072 + 2 * 768) * 4
    assert (found.activations, found.logits) == (0, 0)


def test_our_items_for_the_lectures_model() -> None:
    fp32 = training_memory(llama3(), FULL, settings())
    assert fp32.weights / GB == pytest.approx(32.12, abs=0.01)
    mixed = training_memory(llama3(), FULL, settings(base="bf16", precision="bf16", master_weights=True))
    assert mixed.weights + mixed.gradients + mixed.optimizer == 16 * 8_030_261_248


def test_qlora_of_2048_tokens_takes_14_gb_or_not_by_checkpointing() -> None:
    qlora = MethodSpec(Method.QLORA, rank=16, targets="all-linear")
    change = {"batch": 1, "sequence_length": 2048, "precision": "bf16", "base": "nf4-double", "device": "cuda"}
    with_blocks, without = (
        training_memory(llama3(), qlora, settings(**change, checkpointing=kept)).total / GB for kept in (True, False)
    )
    assert with_blocks < 14 < without
