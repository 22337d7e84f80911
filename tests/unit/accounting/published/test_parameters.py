"""Published parameter counts: every cell against an exact integer that was worked out apart from this code."""

import pytest

from rankbits.accounting.architectures.read import Head, find_config, read_shape
from rankbits.accounting.params import base_parameters, count
from rankbits.accounting.published.cells import Row, Verdict
from rankbits.accounting.published.operations import table1
from rankbits.accounting.published.parameters import CountCell, CountGroup, count_rows, read_groups
from rankbits.accounting.spec import Linear, Method, MethodSpec, Norm, Table
from rankbits.errors import ModelError

SOURCES = {
    "Bayesian-LoRA, Table 1": {
        "deberta-v3-base: full": 184_423_682,
        "deberta-v3-base: lora r=8": 1_327_104,
        "deberta-v3-base: lora r=2": 331_776,
        "deberta-v3-base: adalora b=576, A and B at r=12": 1_990_656,
        "deberta-v3-base: adalora b=144, A and B at r=3": 497_664,
        "deberta-v3-base: dylora r=8": 294_912,
        "deberta-v3-base: B-LoRA (q)": 442_368,
        "deberta-v3-base: B-LoRA (a)": 442_368,
        "deberta-v3-base: B-LoRA (q + ra)": 442_368,
    },
    "LoRA (Hu et al. 2022), GPT-3": {
        "gpt3-175b: lora r=1": 4_718_592,
        "gpt3-175b: lora r=8": 37_748_736,
        "gpt3-175b: Adapter^H w=1": 7_078_080,
        "gpt3-175b: Adapter^H w=8": 40_109_568,
        "gpt3-175b: PreEmbed": 3_244_032,
    },
    "PEFT's print-out for mT0-large": {
        "mt0-large: lora r=8": 2_359_296,
        "mt0-large: lora r=8, all": 1_231_940_608,
        "mt0-large: lora r=8, share": 0.19151053100118282,
    },
    "Adapters, one layer": {"1024 to 1024: bottleneck w=24": 49_152, "1024 to 1024: full": 1_048_576},
    "MoRA (Jiang et al. 2024), one layer": {
        "4096 to 4096: full": 16_777_216,
        "4096 to 4096: lora r=8": 65_536,
        "4096 to 4096: mora r=8": 65_536,
    },
    "SBoRA (Po et al. 2024), commonsense and arithmetic": {
        "llama-7b: lora r=32": 56_098_816,
        "llama-7b: lora r=64": 112_197_632,
        "llama-7b: dora r=32": 56_975_360,
        "llama-7b: dora r=64": 113_074_176,
        "llama-7b: sbora-fa r=32": 28_049_408,
        "llama-7b: sbora-fb r=64": 56_098_816,
        "llama3-8b: lora r=32": 56_623_104,
        "llama3-8b: lora r=64": 113_246_208,
        "llama3-8b: dora r=32": 57_409_536,
        "llama3-8b: dora r=64": 114_032_640,
        "llama3-8b: sbora-fa r=32": 25_165_824,
        "llama3-8b: sbora-fa r=64": 50_331_648,
        "llama3-8b: sbora-fb r=32": 31_457_280,
        "llama3-8b: sbora-fb r=64": 62_914_560,
    },
    "QSBoRA (Po et al. 2024), MMLU": {
        "llama-7b: qlora r=64": 159_907_840,
        "llama-7b: qdora r=64": 161_267_712,
        "llama-7b: qsbora-fa r=64": 87_031_808,
        "llama-7b: qsbora-fb r=64": 72_876_032,
        "llama-13b: qlora r=64": 250_347_520,
        "llama-13b: qdora r=64": 252_477_440,
        "llama-13b: qsbora-fa r=64": 136_314_880,
        "llama-13b: qsbora-fb r=64": 114_032_640,
        "llama3-8b: qlora r=64": 167_772_160,
        "llama3-8b: qdora r=64": 169_148_416,
        "llama3-8b: qsbora-fa r=64": 88_080_384,
        "llama3-8b: qsbora-fb r=64": 79_691_776,
    },
}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return count_rows(table1().counts + read_groups("parameters.json"))


@pytest.mark.parametrize("source", SOURCES)
def test_exact_counts(rows: list[Row], source: str):
    found = {row.cell: row.recomputed for row in rows if row.table == source}
    assert {cell: found[cell] for cell in SOURCES[source]} == SOURCES[source]


def test_every_verdict_holds_and_every_cell_has_a_reason(rows: list[Row]):
    assert [row for row in rows if not row.holds] == []
    assert all(row.reason.endswith(".") for row in rows)


def test_which_cells_are_wrong_or_cannot_be_reproduced(rows: list[Row]):
    doubtful = {(row.cell, row.published) for row in rows if row.verdict is not Verdict.REPRODUCED}
    halves = {(row.cell, row.published) for row in rows if row.table.startswith("QSBoRA")}
    assert len(halves) == 12
    assert doubtful - halves == {
        ("deberta-v2-xxlarge: full", "1500.0M"),
        ("gpt3-175b: full", "175,255.8M"),
        ("gpt3-175b: BitFit", "14.2M"),
        ("gpt3-175b: PreLayer", "20.2M"),
        ("bert-large: adapters", "3.6%"),
        ("llama3-8b: dora r=16", "0.35%"),
        *(("VL-BART: LoRA", share) for share in ("5.93%", "5.17%")),
        *(("VL-BART: DoRA", share) for share in ("5.96%", "5.19%")),
        ("LLaVA-1.5-7B: LoRA", "4.61%"),
        ("LLaVA-1.5-7B: DoRA", "4.63%"),
    }


def test_counts_on_a_four_bit_base_were_printed_as_halves(rows: list[Row]):
    halves = [row for row in rows if row.table.startswith("QSBoRA")]
    assert {row.verdict for row in halves} == {Verdict.MISPRINT}
    assert all(row.explained == row.recomputed / 2 for row in halves)


def test_one_count_for_every_choice_of_matrices(rows: list[Row]):
    counts = [row.recomputed for row in rows if row.table.endswith("which matrices")]
    assert counts == [18_874_368] * 7


@pytest.mark.parametrize(
    ("model", "targets", "rank", "parameters"),
    [
        ("qwen2-7b", "all-linear", 64, 161_480_704),
        ("qwen2-7b", ("q_proj", "k_proj", "v_proj"), 64, 27_525_120),
        ("phi-2", "all-linear", 64, 94_371_840),
        ("phi-2", ("q_proj", "k_proj", "v_proj"), 64, 31_457_280),
        ("llama-13b", ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), 32, 87_818_240),
        ("roberta-large", ("query", "value"), 8, 786_432),
        ("deberta-v2-xxlarge", ("query_proj", "value_proj"), 16, 4_718_592),
        ("roberta-base", ("query", "value"), 8, 294_912),
    ],
)
def test_counts_of_lora_on_other_models(model: str, targets, rank: int, parameters: int):
    shape = read_shape(find_config(model), name=model)
    assert count(shape, MethodSpec(Method.LORA, rank=rank, targets=targets)).trainable == parameters


FIVE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
SIX = ("query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense")
SEVEN_SITES = ("weight", "down", "diagonal", "up", "down_output", "diagonal_output", "output")


@pytest.mark.parametrize(
    ("model", "spec", "parameters"),
    [
        ("deberta-v3-base", MethodSpec(Method.ADALORA, rank=12, targets=SIX), 1_991_520),
        ("deberta-v3-base", MethodSpec(Method.ADALORA, rank=3, targets=SIX), 497_880),
        ("llama-7b", MethodSpec(Method.DORA, rank=16, targets=FIVE), 28_925_952),
        ("llama2-7b", MethodSpec(Method.DORA, rank=16, targets=FIVE), 28_925_952),
        ("llama3-8b", MethodSpec(Method.DORA, rank=16, targets=FIVE), 29_097_984),
        ("llama-13b", MethodSpec(Method.DORA, rank=32, targets=FIVE), 89_190_400),
        ("llama-7b", MethodSpec(Method.PREFIX, virtual_tokens=30), 7_864_320),
        ("llama-13b", MethodSpec(Method.PREFIX, virtual_tokens=10), 4_096_000),
        (
            "minilm-l6",
            MethodSpec(Method.BAYESIAN_LORA, rank=8, targets=("query", "key", "value"), sites=SEVEN_SITES),
            111_492,
        ),
    ],
)
def test_exact_counts_of_what_was_printed_as_a_share_or_rounded(model: str, spec: MethodSpec, parameters: int):
    assert count(read_shape(find_config(model), name=model), spec).trainable == parameters


def test_the_reasons_that_name_numbers_are_true():
    gpt3 = read_shape(find_config("gpt3-175b"), name="gpt3-175b")
    base = base_parameters(gpt3)
    assert (round(base, -5), round(base + 50257 * 12288, -5)) == (174_604_300_000, 175_221_800_000)
    biases = sum(part.d_out for part in gpt3.parts if isinstance(part, Linear) and "layers.0." in part.name)
    biases += sum(part.width for part in gpt3.parts if isinstance(part, Norm) and "layers.0." in part.name)
    assert biases == 11 * 12288
    assert round(12 * 12288 * 96 / 1e6, 1) == 14.2
    assert [round(rows * 12288 * 96 / 1e6, 1) for rows in (17, 18)] == [20.1, 21.2]
    xxl = read_shape(find_config("deberta-v2-xxlarge"), name="xxl", head=Head.CLASSIFICATION)
    words = next(part for part in xxl.parts if isinstance(part, Table) and "word" in part.name)
    assert round((base_parameters(xxl) - words.entries * words.width) / 1e6) == 1370


def test_no_one_number_of_tokens_fits_both_prefixes():
    def share(model: str, tokens: int, base: int) -> float:
        shape = read_shape(find_config(model), name=model)
        trained = count(shape, MethodSpec(Method.PREFIX, virtual_tokens=tokens)).trainable
        return 100 * trained / (base + trained)

    for tokens in range(1, 60):
        small, large = share("llama-7b", tokens, 6_738_415_616), share("llama-13b", tokens, 13_015_864_320)
        assert not (0.105 <= small < 0.12 and 0.025 <= large < 0.04), tokens


def test_the_misprinted_share_is_loras(rows: list[Row]):
    group = next(g for g in read_groups("parameters.json") if g.model == "llama3-8b" and "commonsense" in g.source)
    lora = CountCell(method=Method.LORA, rank=16, quantity="share", published="0.35%")
    (row,) = count_rows([group.model_copy(update={"cells": [lora]})])
    assert row.recomputed == pytest.approx(0.3513, abs=5e-5)
    assert row.holds


def test_a_cell_that_names_unknown_layers_is_refused():
    cell = CountCell(method=Method.LORA, published="1M", targets=["qerry"])
    group = CountGroup(source="s", model="bert-base", reason="r.", cells=[cell])
    with pytest.raises(ModelError, match="'qerry' matches no linear layer"):
        count_rows([group])


def test_a_cell_without_a_method_is_left_unexplained():
    cell = CountCell(label="other", published="3M", verdict=Verdict.IRREPRODUCIBLE, reason="unknown.")
    (row,) = count_rows([CountGroup(source="s", reason="", cells=[cell])])
    assert (row.cell, row.recomputed, row.explained, row.holds) == ("other", None, None, True)
