"""Curves: a panel for each quantity that was logged, a line for each kind of quantizer or each run."""

from collections.abc import Callable

import pytest

from rankbits.records import RunRecord
from rankbits.reports.figures.canvas import style
from rankbits.reports.figures.figure import Figure
from rankbits.reports.figures.training import training

pytest.importorskip("matplotlib")
Texts = Callable[[Figure], list[str]]


def _training(**runs: RunRecord) -> Figure:
    figure = training(runs)
    assert figure is not None
    return figure


@pytest.fixture
def by_site(gated_run: RunRecord) -> RunRecord:
    history = [row | {"bits_weight": 16.0 + number, "bits_up": 4.0} for number, row in enumerate(gated_run.history)]
    return gated_run.model_copy(update={"history": history})


def test_there_is_a_panel_for_each_quantity(gated_run: RunRecord, lora_run: RunRecord, texts: Texts) -> None:
    assert {"loss", "mean bits", "mean rank"} <= set(texts(_training(run=gated_run)))
    assert not {"mean bits", "mean rank"} & set(texts(_training(run=lora_run)))


def test_bits_are_drawn_by_quantizer_where_that_was_logged(by_site: RunRecord, texts: Texts) -> None:
    figure = _training(run=by_site)
    assert {"W0", "B"} <= set(texts(figure))
    assert {row[2] for row in figure.rows} == {"loss", "bits_weight", "bits_up", "rank_mean"}
    with style():
        bits = figure.draw().axes[1]
    assert [line.get_ydata()[-1] for line in bits.lines] == [40.0, 4.0]
    assert len({line.get_linestyle() for line in bits.lines}) == 2
    assert "mean bits from 4–16 to 4–40" in figure.label


def test_several_runs_are_a_line_each(by_site: RunRecord, lora_run: RunRecord, texts: Texts) -> None:
    figure = _training(ours=by_site, lora=lora_run)
    assert {"ours", "lora"} <= set(texts(figure))
    assert {(row[0], row[2]) for row in figure.rows} == {
        ("ours", "loss"), ("ours", "bits_mean"), ("ours", "rank_mean"), ("lora", "loss"),
    }  # fmt: skip
    with style():
        loss, bits, _, _ = figure.draw().axes
    assert [len(loss.lines), len(bits.lines)] == [2, 1]
    assert len({(line.get_color(), line.get_linestyle()) for line in loss.lines}) == 2


def test_it_describes_itself_from_first_to_last(gated_run: RunRecord, lora_run: RunRecord) -> None:
    label = _training(run=gated_run).label
    assert label.startswith("Curves over 250 optimizer steps: loss from 0.643 to 0.385, mean bits from 32 to 6, ")
    assert _training(a=lora_run, b=lora_run).label.startswith("Curves of 2 runs over 250 optimizer steps: loss from")


def test_the_numbers_are_those_of_the_history(lora_run: RunRecord) -> None:
    rows = _training(run=lora_run).rows
    assert rows == [("run", row["step"], "loss", row["loss"]) for row in lora_run.history]


@pytest.mark.parametrize(
    "history", [[], [{"step": 1.0, "loss": 0.5}], [{"loss": 0.5}, {"loss": 0.4}], [{"step": 1.0}] * 2]
)
def test_a_history_without_a_line_has_no_curves(lora_run: RunRecord, history: list[dict[str, float]]) -> None:
    assert training({"run": lora_run.model_copy(update={"history": history})}) is None
