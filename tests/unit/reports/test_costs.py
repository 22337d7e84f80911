"""What is said of costs: every number with its conditions, and no percentages of different bases side by side."""

import pytest

from rankbits.records import CostRecord, CountOptions, Product
from rankbits.reports.costs import (
    breakdown,
    compare_costs,
    comparison_notes,
    cost_lines,
    module_kind,
    options_text,
    percent_text,
    shares_reference,
    si,
)

OPTIONS = (
    "20 query and 20 key tokens, batch 1, padded, dense attention, adapters merged, position rows recomputed, "
    "language-model head left out, look-up tables left out in bytes, floats run in 32 bits, no int4 kernel"
)


def test_lines_give_totals_shares_and_conditions(narrow_costs: CostRecord) -> None:
    assert cost_lines(narrow_costs) == [
        "MACs: 1,000; the reference, the merged base model: 1,000.",
        "Nominal BOPs: 60,800, 23.75 % of the reference at 16 × 16 bits and 5.94 % of the reference at 32 × 32 bits.",
        "Executable BOPs: 371,200, 145.00 % of the reference at 16 × 16 bits and 36.25 % of the reference at "
        "32 × 32 bits.",
        "An integer kernel can execute 60.0% of the MACs.",
        f"Counted: {OPTIONS}.",
        "Products counted: linear 2, scores 1.",
        "Besides, in no product: 4,321 element operations.",
        # 300 numbers of 4 bits with one scale and 100 of 32; (300·4 + 100·32) / 400; (600·4 + 300·4 + ...) by MACs.
        "Weights: 554 bytes at their nominal widths, if packed; mean width 11.00 bits by numbers, 4.00 bits by MACs.",
    ]


def test_adapters_beside_the_base_have_their_share(float_costs: CostRecord, narrow_costs: CostRecord) -> None:
    assert "Adapters beside the base model make 3.85% of the MACs." in cost_lines(float_costs)
    assert not any(line.startswith("Adapters") for line in cost_lines(narrow_costs))


def test_what_was_not_recorded_has_no_line(narrow_costs: CostRecord) -> None:
    bare = narrow_costs.model_copy(update={"elements": [], "weights": []})
    assert cost_lines(bare) == cost_lines(narrow_costs)[:-2]


def test_weights_without_products_have_no_mean_width_by_macs(narrow_costs: CostRecord) -> None:
    assert cost_lines(narrow_costs.model_copy(update={"products": []}))[-1].endswith("if packed.")


def test_a_base_without_products_is_no_reference(narrow_costs: CostRecord) -> None:
    without = narrow_costs.model_copy(update={"reference_macs": 0})
    assert cost_lines(without)[1] == "Nominal BOPs: 60,800, of no reference: the base model has no products."
    assert compare_costs({"a": without}).rows[0][4:6] == ["no reference", "no reference"]


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"key_len": 30}, "20 query and 30 key tokens"),
        ({"source_len": 9}, "9 source tokens"),
        ({"batch": 2, "lengths": [20, 7]}, "batch 2, real lengths 20, 7"),
        ({"causal": "triangular"}, "triangular attention"),
        ({"adapters": "unmerged"}, "adapters unmerged"),
        ({"positions": "cached"}, "position rows cached"),
        ({"head": "last"}, "language-model head on last positions"),
        ({"embeddings": "in"}, "look-up tables counted in bytes"),
        ({"float_bits": 16}, "floats run in 16 bits"),
        ({"int4": True}, "with an int4 kernel"),
    ],
)
def test_every_option_is_said(options: dict, phrase: str) -> None:
    text = options_text(CountOptions(**{"query_len": 20, "key_len": 20} | options))
    assert phrase in text
    assert phrase not in OPTIONS


class TestComparison:
    def test_runs_of_one_base_have_percentages_of_both_widths(
        self, narrow_costs: CostRecord, float_costs: CostRecord
    ) -> None:
        compared = compare_costs({"a": narrow_costs, "b": float_costs})
        assert compared.columns == (
            "run", "MACs", "nominal BOPs", "executable BOPs", "nominal, % of 16 / 32-bit base",
            "executable, % of 16 / 32-bit base", "integer MACs",
        )  # fmt: skip
        assert compared.rows == [
            ["a", "1.000 K", "60.80 K", "371.2 K", "23.75 / 5.94", "145.00 / 36.25", "60.0%"],
            ["b", "1.040 K", "1.065 M", "1.065 M", "416.00 / 104.00", "416.00 / 104.00", "0.0%"],
        ]

    def test_conditions_that_are_alike_are_said_once(self, narrow_costs: CostRecord) -> None:
        assert compare_costs({"a": narrow_costs, "b": narrow_costs}).notes == [
            "All percentages are of one base, the merged base model: 1,000 MACs, 256,000 BOPs at 16 × 16 bits and "
            "1,024,000 BOPs at 32 × 32 bits.",
            f"Counted: {OPTIONS}.",
            "Products counted: linear 2, scores 1.",
        ]

    def test_conditions_that_differ_are_said_of_each(self, narrow_costs: CostRecord, float_costs: CostRecord) -> None:
        notes = comparison_notes({"a": narrow_costs, "b": float_costs, "c": narrow_costs})
        assert notes[1:] == [
            f"Counted for a; c: {OPTIONS}.",
            f"Counted for b: {OPTIONS.replace('merged', 'unmerged', 1)}.",
            "Products counted for a; c: linear 2, scores 1.",
            "Products counted for b: linear 1, scores 1, lora_down 1.",
        ]

    def test_runs_of_different_bases_have_no_percentages(
        self, narrow_costs: CostRecord, other_costs: CostRecord
    ) -> None:
        compared = compare_costs({"a": narrow_costs, "b": other_costs})
        assert not any("%" in column for column in compared.columns)
        assert compared.rows[1] == ["b", "7.000 K", "1.792 M", "1.792 M", "0.0%"]
        assert compared.notes[0] == (
            "No percentages: the runs have no common reference, so only absolute numbers can be compared. "
            "The merged base model for a: 1,000 MACs. The merged base model for b: 7,000 MACs."
        )

    def test_an_uncounted_run_says_so_beside_others(self, narrow_costs: CostRecord) -> None:
        compared = compare_costs({"a": None, "b": narrow_costs})
        assert compared.rows[0] == ["a", "not counted", "", "", "", "", ""]
        assert len(compared.notes) == 3

    def test_nothing_counted_has_no_conditions(self) -> None:
        compared = compare_costs({"a": None})
        assert (compared.rows, compared.notes) == ([["a", "not counted", "", "", ""]], [])


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ({"adapters": "unmerged", "float_bits": 16, "int4": True, "embeddings": "in"}, True),
        ({"query_len": 10, "key_len": 20}, False),
        ({"batch": 2}, False),
        ({"positions": "cached"}, False),
        ({"causal": "triangular"}, False),
        ({"head": "all"}, False),
    ],
)
def test_a_reference_is_shared_if_only_adapters_and_kernels_differ(
    narrow_costs: CostRecord, options: dict, shared: bool
) -> None:
    """Equal MACs under other lengths are no common reference either."""
    changed = CountOptions(**{"query_len": 20, "key_len": 20} | options)
    assert shares_reference([narrow_costs, narrow_costs.model_copy(update={"options": changed})]) is shared


def test_references_of_other_size_are_not_shared(narrow_costs: CostRecord) -> None:
    assert not shares_reference([narrow_costs, narrow_costs.model_copy(update={"reference_macs": 1001})])


def test_parts_sum_what_has_one_name(narrow_costs: CostRecord) -> None:
    linear, scores = breakdown(narrow_costs, lambda product: product.op)
    assert (linear.name, linear.products, linear.macs, linear.integer_macs) == ("linear", 2, 900, 600)
    assert (linear.bops, linear.executable_bops) == (48_000, 345_600)
    assert (scores.bops, scores.executable_bops) == (12_800, 25_600)


def test_parts_make_the_whole(narrow_costs: CostRecord, float_costs: CostRecord) -> None:
    for costs in (narrow_costs, float_costs):
        for key in (module_kind, lambda product: product.op):
            parts = breakdown(costs, key)
            assert sum(part.macs for part in parts) == costs.macs
            assert sum(part.bops for part in parts) == costs.bops
            assert sum(part.executable_bops for part in parts) == costs.executable_bops
            assert [part.macs for part in parts] == sorted((part.macs for part in parts), reverse=True)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("deberta.encoder.layer.11.attention.self.query_proj", "attention.self.query_proj"),
        ("encoder.block.3.layer.0.SelfAttention.q", "SelfAttention.q"),
        ("pooler.dense", "pooler.dense"),
        ("blocks.7", "blocks.7"),
    ],
)
def test_a_kind_of_module_has_no_layer(narrow_costs: CostRecord, module: str, kind: str) -> None:
    product: Product = narrow_costs.products[0].model_copy(update={"module": module})
    assert module_kind(product) == kind


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (7, "7"), (999, "999"), (1000, "1.000 K"), (1_428_381_696, "1.428 G"), (12_345, "12.35 K"),
        (123_456, "123.5 K"), (9_999_600, "10.00 M"), (999_949, "999.9 K"), (999_960, "1.000 M"), (10**12, "1.000 T"),
        (10**15, "1.000 P"),
    ],
)  # fmt: skip
def test_numbers_have_four_digits_and_a_prefix(number: int, text: str) -> None:
    assert si(number) == text


def test_percentages_have_two_digits() -> None:
    assert (percent_text(97.04381), percent_text(float("nan"))) == ("97.04 %", "no reference")
