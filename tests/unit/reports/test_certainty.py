"""What a page says about certainty: expected against delivered, gates near their threshold, budgets, shared widths."""

from pathlib import Path

from rankbits.records import RunRecord
from rankbits.reports import sections
from rankbits.reports.certainty import certainty_lines, near_gates
from rankbits.reports.figures import report_figures
from rankbits.reports.figures.certainty import certainty
from rankbits.reports.findings import findings
from rankbits.reports.html import render

QUERY, KEY = (f"encoder.layer.0.attention.self.{name}" for name in ("query", "key"))


def test_gates_near_their_threshold_are_named_nearest_first(certain_run: RunRecord) -> None:
    assert near_gates(certain_run) == [
        [QUERY, "8 bits of W0", "0.700", "0.66", "on"],
        [QUERY, "rank 3", "0.540", "0.50", "on"],
        [KEY, "4 bits of W0", "0.600", "0.66", "off"],
    ]


def test_means_are_over_a_matrixs_own_gates(certain_run: RunRecord) -> None:
    ranks, bits, sure, nearest = certainty_lines(certain_run)
    assert ranks == "Mean rank: 3.00 as delivered, 2.60 expected under the gate probabilities."
    assert bits == "Mean width in bits: 5.00 as delivered, 5.00 expected under the gate probabilities."
    assert sure == "4 of 7 gates that decide are at least 0.1 from their threshold."
    assert nearest.startswith(f"Nearest to theirs, by probability of being open: {QUERY}: 8 bits of W0 (0.70); ")


def test_a_record_without_open_probabilities_says_nothing(gated_run: RunRecord, lora_run: RunRecord) -> None:
    for run in (gated_run, lora_run):
        assert certainty_lines(run) == near_gates(run) == []
        assert certainty({"run": run}) is None
        assert "certainty" not in [figure.name for figure in report_figures([run]).all()]


def test_the_figure_has_delivered_and_expected_of_each_matrix(certain_run: RunRecord) -> None:
    figure = certainty({"run": certain_run})
    assert figure is not None
    assert figure.columns[3:] == ("rank", "expected_rank", "bits_mean", "expected_bits_mean")
    assert [row[3:] for row in figure.rows] == [(3.0, 2.6, 8.0, 6.0), (None, None, 5.0, 6.0)]
    assert "2 matrices; furthest apart by a factor of 1.33" in figure.label
    assert "certainty" in [figure.name for figure in report_figures([certain_run]).all()]


def test_budgets_are_told_with_what_was_reached(certain_run: RunRecord) -> None:
    told = [sentence for sentence in findings(certain_run) if sentence.startswith("Budget")]
    assert told == [
        "Budget bops=0.25: 23.75% of at most 25.00% of the bit operations of the merged base at 32 bits.",
        "Budget bits=4: 4.125 of at most 4.000 bits a weight on average: more than allowed.",
    ]


def test_an_input_that_two_matrices_share_is_one_quantizer(certain_run: RunRecord) -> None:
    assert "Of 3 quantizers, 1 at 2 bits, 2 at 8 bits" in findings(certain_run)[1]
    table = sections.modules(certain_run)
    assert [row[-1] for row in table["rows"]] == ["8", "8="]
    assert table["note"] == f"= the width is that of another matrix ({QUERY})."


def test_the_page_shows_all_of_it(certain_run: RunRecord, gated_run: RunRecord, tmp_path: Path) -> None:
    render([certain_run], tmp_path / "page.html", {})
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for text in ("How certain it is", "Gates near their threshold", "Expected against delivered", "8 bits of W0"):
        assert text in page
    assert "Budget bops=0.25" in page
    assert "= the width is that of another matrix" in page
    render([gated_run], tmp_path / "old.html", {})
    assert "How certain it is" not in (tmp_path / "old.html").read_text(encoding="utf-8")
