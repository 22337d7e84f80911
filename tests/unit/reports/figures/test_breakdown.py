"""Bars of cost by kind of product: their lengths are sums over the products, their numbers stand beside them."""

from collections.abc import Callable

import pytest

from rankbits.records import CostRecord, RunRecord
from rankbits.reports.figures.breakdown import cost_by_product
from rankbits.reports.figures.canvas import HATCHES, style
from rankbits.reports.figures.figure import Figure

pytest.importorskip("matplotlib")
Texts = Callable[[Figure], list[str]]


@pytest.fixture
def both(gated_run: RunRecord, lora_run: RunRecord, narrow_costs: CostRecord, float_costs: CostRecord) -> Figure:
    runs = {"ours": gated_run, "lora": lora_run}
    costs = {"ours": narrow_costs, "lora": float_costs}
    figure = cost_by_product({name: run.model_copy(update={"costs": costs[name]}) for name, run in runs.items()})
    assert figure is not None
    return figure


def test_bars_are_proportional_to_sums_from_zero(both: Figure) -> None:
    with style():
        panels = both.draw().axes[:3]
    ours = [[bar.get_width() for bar in axes.patches[:2]] for axes in panels]
    lora = [[bar.get_width() for bar in axes.patches[2:]] for axes in panels]
    assert ours[0][0] / ours[0][1] == pytest.approx(900 / 100)
    assert ours[1][0] / lora[1][0] == pytest.approx(48_000 / (900 * 1024))
    assert ours[2][1] / lora[2][2] == pytest.approx(25_600 / (40 * 1024))
    assert {bar.get_x() for axes in panels for bar in axes.patches} == {0.0}


def test_runs_differ_in_hatch_too(both: Figure) -> None:
    with style():
        patches = both.draw().axes[0].patches
    assert [bar.get_hatch() or "" for bar in patches] == [HATCHES[0]] * 2 + [HATCHES[1]] * 3


def test_sums_kinds_runs_and_conditions_are_written(both: Figure, texts: Texts) -> None:
    said = texts(both)
    for text in ("linear", "scores", "lora_down", "48.00 K", "345.6 K", "ours", "lora"):
        assert text in said
    assert "adapters unmerged" in " ".join(said)


def test_numbers_are_split_by_module_too(both: Figure) -> None:
    assert both.columns[:3] == ("run", "op", "module")
    assert both.rows == [
        ("ours", "linear", "attention.self.query", 1, 600, 600, 9_600, 38_400),
        ("ours", "linear", "output.dense", 1, 300, 0, 38_400, 307_200),
        ("ours", "scores", "attention.self", 1, 100, 0, 12_800, 25_600),
        ("lora", "linear", "attention.self.query", 1, 900, 0, 921_600, 921_600),
        ("lora", "scores", "attention.self", 1, 100, 0, 102_400, 102_400),
        ("lora", "lora_down", "attention.self.query", 1, 40, 0, 40_960, 40_960),
    ]


def test_one_run_needs_no_legend(gated_run: RunRecord, narrow_costs: CostRecord, texts: Texts) -> None:
    figure = cost_by_product({"ours": gated_run.model_copy(update={"costs": narrow_costs})})
    assert figure is not None
    assert "ours" not in texts(figure)


def test_runs_that_were_not_counted_have_no_bars(gated_run: RunRecord, narrow_costs: CostRecord) -> None:
    empty = narrow_costs.model_copy(update={"products": []})
    assert cost_by_product({"a": gated_run, "b": gated_run.model_copy(update={"costs": empty})}) is None
