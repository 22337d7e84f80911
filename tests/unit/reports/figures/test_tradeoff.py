"""Score against cost: percentages only of one reference, scores compared only within a task, numbers absolute."""

from collections.abc import Callable

import pytest

from rankbits.records import CostRecord, CountOptions, RunRecord
from rankbits.reports.figures.canvas import style
from rankbits.reports.figures.figure import Figure
from rankbits.reports.figures.scatter import round_numbers, spread_apart
from rankbits.reports.figures.tradeoff import score_by_bops, score_by_bytes

pytest.importorskip("matplotlib")
Texts = Callable[[Figure], list[str]]


def _bops(runs: dict[str, RunRecord]) -> Figure:
    figure = score_by_bops(runs)
    assert figure is not None
    return figure


def _points(figure: Figure, panel: int) -> list[tuple[float, float]]:
    """Costs and scores of the marks of a panel, in the order they are drawn."""
    with style():
        lines = figure.draw().axes[panel].lines
    return [(10 ** line.get_xdata()[0], line.get_ydata()[0]) for line in lines if line.get_marker() not in {"", "None"}]


@pytest.fixture
def unlike(runs: dict[str, RunRecord], other_costs: CostRecord) -> dict[str, RunRecord]:
    return {
        name: run.model_copy(update={"costs": other_costs}) if name == "lora, mrpc" else run
        for name, run in runs.items()
    }


class TestBitOperations:
    def test_of_one_base_stand_in_percent(self, runs: dict[str, RunRecord], texts: Texts) -> None:
        figure = _bops(runs)
        assert _points(figure, 0) == [
            pytest.approx(point) for point in [(23.75, 78.125), (145, 78.125), (416, 78.5), (416, 78.5)]
        ]
        assert texts(figure).count("BOPs, % of the base at 16 bits") == 3
        assert "in percent of one shared reference" in figure.reading

    def test_have_all_conditions_in_the_figure_itself(self, runs: dict[str, RunRecord], texts: Texts) -> None:
        said = " ".join(texts(_bops(runs)))
        for condition in (
            "256,000 BOPs at 16 × 16 bits and 1,024,000 BOPs at 32 × 32 bits", "20 query and 20 key tokens, batch 1",
            "adapters merged", "adapters unmerged", "linear 2, scores 1", "between 0.0% and 60.0% of the MACs",
        ):  # fmt: skip
            assert condition in said

    def test_of_different_bases_stand_as_absolute_numbers(self, unlike: dict[str, RunRecord], texts: Texts) -> None:
        figure = _bops(unlike)
        assert _points(figure, 0) == [
            pytest.approx(p) for p in [(60_800, 78.125), (371_200, 78.125), (1_792_000, 78.5), (1_792_000, 78.5)]
        ]
        said = texts(figure)
        assert not any("%" in text and "BOPs" in text for text in said)
        assert "as absolute numbers, because the runs have no common reference" in figure.reading
        assert any(text.startswith("No percentages: the runs have no common reference") for text in said)

    def test_tasks_have_a_panel_each_and_methods_one_mark(self, runs: dict[str, RunRecord], texts: Texts) -> None:
        figure = _bops(runs)
        said = texts(figure)
        assert {"mrpc, validation", "rte, validation", "stsb, validation"} <= set(said)
        assert (said.count("bayesian-lora"), said.count("lora")) == (3, 3)
        with style():
            panels = figure.draw().axes
        marks = [[(line.get_marker(), line.get_color()) for line in axes.lines] for axes in panels]
        assert marks[0] == marks[1] == marks[2]
        assert len(set(marks[0])) > 2

    def test_numbers_are_absolute_with_their_conditions(self, runs: dict[str, RunRecord]) -> None:
        figure = _bops(runs)
        row = dict(zip(figure.columns, figure.rows[0], strict=True))
        assert row == {
            "run": "bayesian-lora, mrpc", "task": "mrpc", "metric": "accuracy", "split": "validation",
            "score": 78.125, "query_len": 20, "key_len": 20, "source_len": None, "batch": 1, "adapters": "merged",
            "positions": "recomputed", "head": "out", "causal": "dense", "lengths": "", "float_bits": 32, "int4": 0,
            "macs": 1000, "integer_macs": 600, "bops_nominal": 60_800,
            "bops_executable": 371_200, "reference_macs": 1000, "reference_bops_16": 256_000,
            "reference_bops_32": 1_024_000,
        }  # fmt: skip
        assert len(figure.rows) == 6

    def test_a_single_counted_run_has_no_figure(self, gated_run: RunRecord, runs: dict[str, RunRecord]) -> None:
        assert score_by_bops({"a": gated_run, "b": runs["lora, mrpc"]}) is None

    def test_a_run_without_products_is_left_out(self, runs: dict[str, RunRecord], narrow_costs: CostRecord) -> None:
        empty = narrow_costs.model_copy(update={"products": []})
        first, second, third, *_ = runs.values()
        figure = _bops({"a": first, "b": second, "c": third.model_copy(update={"costs": empty})})
        assert {row[0] for row in figure.rows} == {"a", "b"}


class TestBytes:
    def test_are_those_of_all_weights(self, runs: dict[str, RunRecord]) -> None:
        figure = score_by_bytes(runs)
        assert figure is not None
        assert figure.rows[0] == ("bayesian-lora, mrpc", "mrpc", "accuracy", "validation", 78.125, 554, "out")
        assert _points(figure, 0) == [pytest.approx((554, 78.125)), pytest.approx((554, 78.5))]
        assert "Look-up tables are left out." in figure.reading

    def test_say_where_tables_are_counted_for_some_only(self, runs: dict[str, RunRecord]) -> None:
        def counting(run: RunRecord) -> RunRecord:
            assert run.costs is not None
            options = CountOptions(query_len=20, key_len=20, embeddings="in")
            return run.model_copy(update={"costs": run.costs.model_copy(update={"options": options})})

        first, second, *_ = runs.values()
        mixed, alike = (score_by_bytes({"a": counting(first), "b": b}) for b in (second, counting(second)))
        assert mixed is not None
        assert alike is not None
        assert "Not all alike: look-up tables are counted only for a." in mixed.reading
        assert "Look-up tables are counted." in alike.reading

    def test_without_weights_there_is_no_figure(self, runs: dict[str, RunRecord], narrow_costs: CostRecord) -> None:
        bare = narrow_costs.model_copy(update={"weights": []})
        assert score_by_bytes({name: run.model_copy(update={"costs": bare}) for name, run in runs.items()}) is None


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([0.5, 1.5], [0.5, 1.5]),
        ([0.5, 0.5, 0.5], [0.5, 0.7, 0.9]),
        ([1.9, 1.95], [1.8, 2.0]),
        ([0.0, 1.9, 1.95, 2.0], [0.0, 1.6, 1.8, 2.0]),
        ([], []),
    ],
)
def test_labels_keep_apart_and_below_the_top(wanted: list[float], placed: list[float]) -> None:
    assert spread_apart(wanted, 0.2, 2.0) == pytest.approx(placed)


@pytest.mark.parametrize(
    ("low", "high", "numbers"),
    [
        (90, 260, [100, 150, 200]),
        (9, 1100, [10, 100, 1000]),
        (40, 600, [50, 100, 200, 500]),
        (0.9, 1.1e9, [10.0**power for power in range(10)]),
    ],
)
def test_ticks_are_round_and_not_many(low: float, high: float, numbers: list[float]) -> None:
    assert round_numbers(low, high) == pytest.approx(numbers)
