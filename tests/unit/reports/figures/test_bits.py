"""Widths stand in their rows and columns, spreads show every matrix, and runs stand beside each other by quantizer."""

import math
import re
from collections import Counter
from collections.abc import Callable

import pytest

from rankbits.records import RunRecord
from rankbits.reports.figures.bits import bits_by_matrix, bits_by_quantizer, bits_by_run
from rankbits.reports.figures.canvas import MARKERS, page_svg, style
from rankbits.reports.figures.figure import Figure

pytest.importorskip("matplotlib")
Texts = Callable[[Figure], list[str]]


def _of(make: Callable[[dict[str, RunRecord]], Figure | None], record: RunRecord) -> Figure:
    figure = make({"run": record})
    assert figure is not None
    return figure


def test_each_width_stands_in_its_row_and_column(gated_run: RunRecord, texts: Texts) -> None:
    widths = Counter(str(bits) for module in gated_run.modules for bits in module.bits.values())
    rows = [f"{layer}.{kind}" for layer in range(6) for kind in ("query", "key", "value")]
    expected = widths + Counter([*rows, "W0", "A", "E", "B", "A out", "E out", "out"])
    assert Counter(texts(_of(bits_by_matrix, gated_run))) == expected


def test_rows_are_in_the_order_of_layers(gated_run: RunRecord, texts: Texts) -> None:
    figure = _of(bits_by_matrix, gated_run.model_copy(update={"modules": gated_run.modules[::-1]}))
    assert [text[0] for text in texts(figure) if "." in text] == [layer for layer in "012345" for _ in range(3)]


def test_rows_with_one_label_are_told_apart_by_name(gated_run: RunRecord, texts: Texts) -> None:
    twins = [gated_run.modules[0].model_copy(update={"name": name}) for name in ("encoder.0.q", "decoder.0.q")]
    figure = _of(bits_by_matrix, gated_run.model_copy(update={"modules": twins}))
    assert {"encoder.0.q", "decoder.0.q"} <= set(texts(figure))


def test_the_numbers_are_all_widths(gated_run: RunRecord) -> None:
    for make in (bits_by_matrix, bits_by_quantizer):
        figure = _of(make, gated_run)
        assert len(figure.rows) == 18 * 7
        name, width = gated_run.modules[0].name, gated_run.modules[0].bits["weight"]
        assert figure.rows[0] == ("run", "film-reviews", name, 0, "query", "W0", width)


def test_the_spread_has_a_dot_for_each_matrix_and_the_means(gated_run: RunRecord) -> None:
    figure = _of(bits_by_quantizer, gated_run)
    svg = page_svg(figure)
    assert svg.count("fill: #0072b2") == 18 * 7
    assert svg.count("fill: #d55e00") == 7
    assert figure.label.endswith("W0 7.0, A 6.2, E 7.0, B 8.7, A out 7.0, E out 6.2, out 7.0.")


@pytest.mark.parametrize("make", [bits_by_matrix, bits_by_quantizer, bits_by_run])
def test_without_quantizers_there_is_nothing_to_draw(
    lora_run: RunRecord, make: Callable[[dict[str, RunRecord]], Figure | None]
) -> None:
    assert make({"run": lora_run}) is None


class TestByRun:
    def test_each_quantized_run_is_in_the_legend(self, runs: dict[str, RunRecord], texts: Texts) -> None:
        figure = bits_by_run(runs)
        assert figure is not None
        shown = texts(figure)
        assert [name for name in runs if name in shown] == [name for name in runs if name.startswith("bayesian")]
        assert {"W0", "A", "E", "B", "A out", "E out", "out"} <= set(shown)
        assert figure.label == "Bit widths of 7 kinds of quantizer in 3 runs on 3 tasks."
        assert {row[1] for row in figure.rows} == {"mrpc", "rte", "stsb"}

    def test_marks_lines_and_dashes_are_mean_quartiles_span_and_median(self, gated_run: RunRecord) -> None:
        widths = [2, 4, 4, 8, 16]
        modules = [m.model_copy(update={"bits": {"up": w}}) for m, w in zip(gated_run.modules, widths, strict=False)]
        record = gated_run.model_copy(update={"modules": modules})
        figure = bits_by_run({"a": record, "b": record})
        assert figure is not None
        with style():
            axes = figure.draw().axes[0]
        drawn = [[2 ** float(y) for y in line.get_ydata()] for line in axes.lines[:4]]
        assert drawn == [pytest.approx(values) for values in ([2, 16], [4, 8], [4], [6.8])]
        assert axes.lines[3].get_marker() == MARKERS[0]
        assert axes.lines[7].get_marker() == MARKERS[1]
        assert axes.lines[0].get_xdata()[0] < 0 < axes.lines[4].get_xdata()[0]

    def test_one_matrix_is_its_own_spread(self, gated_run: RunRecord) -> None:
        record = gated_run.model_copy(update={"modules": gated_run.modules[:1]})
        figure = bits_by_run({"a": record, "b": record})
        assert figure is not None
        with style():
            lines = figure.draw().axes[0].lines[:4]
        width = math.log2(record.modules[0].bits["weight"])
        assert {float(y) for line in lines for y in line.get_ydata()} == {width}

    def test_a_single_quantized_run_has_no_comparison(self, gated_run: RunRecord, lora_run: RunRecord) -> None:
        assert bits_by_run({"a": gated_run, "b": lora_run}) is None

    def test_many_runs_widen_the_figure_instead_of_overlapping(self, gated_run: RunRecord) -> None:
        figure = bits_by_run({f"run {number}": gated_run for number in range(30)})
        assert figure is not None
        assert float(re.search(r'width="([\d.]+)pt"', page_svg(figure))[1]) > 7 * 30 * 0.11 * 72
