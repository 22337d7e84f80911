"""The sentences of a report say what happened, also when nothing did."""

import pytest

from rankbits.records import CostRecord, RunRecord
from rankbits.reports.findings import findings


def _with_ranks(record: RunRecord, rank: int) -> RunRecord:
    return record.model_copy(update={"modules": [m.model_copy(update={"rank": rank}) for m in record.modules]})


def test_different_ranks_are_named_with_their_matrices(gated_run: RunRecord) -> None:
    assert findings(gated_run)[0] == (
        "Ranks differ between matrices, from 1 (encoder.layer.0.attention.self.query) "
        "to 8 (encoder.layer.4.attention.self.key)."
    )


@pytest.mark.parametrize(
    ("rank", "sentence"),
    [
        (8, "No rank was closed: all 18 matrices keep their full rank."),
        (1, "All 18 matrices ended at the same rank, 1."),
    ],
)
def test_ranks_that_tell_nothing_are_called_so(gated_run: RunRecord, rank: int, sentence: str) -> None:
    assert findings(_with_ranks(gated_run, rank))[0] == sentence


def test_widths_are_counted_and_their_extremes_named(gated_run: RunRecord) -> None:
    assert findings(gated_run)[1] == (
        "Of 126 quantizers, 26 at 2 bits, 36 at 4 bits, 42 at 8 bits, 22 at 16 bits; "
        "narrowest on average is A (6.2), widest B (8.7)."
    )


def test_one_width_everywhere_is_called_so(gated_run: RunRecord) -> None:
    modules = [m.model_copy(update={"bits": dict.fromkeys(m.bits, 2)}) for m in gated_run.modules]
    assert findings(gated_run.model_copy(update={"modules": modules}))[1] == (
        "All 126 quantizers ended at the same width, 2 bits."
    )


def test_no_extremes_are_named_where_the_means_are_equal(gated_run: RunRecord) -> None:
    bits = [{"weight": 2, "down": 4}, {"weight": 4, "down": 2}]
    modules = [m.model_copy(update={"bits": b}) for m, b in zip(gated_run.modules, bits, strict=False)]
    assert findings(gated_run.model_copy(update={"modules": modules}))[1] == (
        "Of 4 quantizers, 2 at 2 bits, 2 at 4 bits."
    )


def test_plain_lora_learned_neither(lora_run: RunRecord) -> None:
    assert findings(lora_run) == [
        "The rank is fixed: all 18 matrices were adapted at rank 8.",
        "Nothing was quantized: every tensor stays in full precision.",
    ]


def test_different_fixed_ranks_are_a_span(lora_run: RunRecord) -> None:
    modules = [lora_run.modules[0].model_copy(update={"rank": 4, "max_rank": 4}), lora_run.modules[1]]
    assert findings(lora_run.model_copy(update={"modules": modules}))[0] == (
        "The rank is fixed: all 2 matrices were adapted at ranks from 4 to 8."
    )


def test_pruned_ranks_are_learned_ranks(pruned_run: RunRecord) -> None:
    assert findings(pruned_run)[0] == (
        "Ranks differ between matrices, from 3 (encoder.layer.0.attention.self.query) "
        "to 4 (encoder.layer.0.attention.self.key)."
    )


def test_costs_are_told_as_macs_and_their_integer_share(lora_run: RunRecord, narrow_costs: CostRecord) -> None:
    assert findings(lora_run.model_copy(update={"costs": narrow_costs}))[2] == (
        "One forward pass of 20 tokens, batch 1, adapters merged, is 1.000 K MACs, of which an integer kernel can "
        "execute 60.0%."
    )


def test_costs_that_no_integer_kernel_lowers_say_so(lora_run: RunRecord, float_costs: CostRecord) -> None:
    assert findings(lora_run.model_copy(update={"costs": float_costs}))[2] == (
        "One forward pass of 20 tokens, batch 1, adapters unmerged, is 1.040 K MACs, none of which an integer kernel "
        "can execute."
    )


def test_a_run_without_adapters_says_so(lora_run: RunRecord) -> None:
    assert findings(lora_run.model_copy(update={"modules": []}))[0] == "No matrix was adapted."
