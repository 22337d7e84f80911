"""What is said when a run has ended."""

from pathlib import Path

import pytest

from rankbits.cli.running import column_widths, print_files, print_runs
from rankbits.records import CostRecord, CountOptions, Product


def _costs(bits: int, reference: int = 4_000_000) -> CostRecord:
    product = Product(
        module="query", op="linear", batch=1, m=20, k=100, n=2000, left="x", right="W0", bits_left=bits,
        bits_right=bits, kind="weight",
    )  # fmt: skip
    return CostRecord(options=CountOptions(query_len=20, key_len=20), products=[product], reference_macs=reference)


def _printed(capsys, monkeypatch: pytest.MonkeyPatch, *records) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    print_runs(records)
    table = capsys.readouterr().out
    assert max(len(line) for line in table.splitlines()) <= 80
    return " ".join(table.split())


def test_costs_stand_below_with_their_conditions(finished, capsys, monkeypatch: pytest.MonkeyPatch):
    said = _printed(capsys, monkeypatch, finished().model_copy(update={"costs": _costs(16)}))
    for text in (
        "100.00 / ",
        " 25.00 ",
        "merged base model: 4,000,000 MACs",
        "20 query and 20 key",
        "linear 1",
        "0.0%",
    ):
        assert text in said


def test_costs_of_different_bases_have_no_percentages(finished, capsys, monkeypatch: pytest.MonkeyPatch):
    runs = [finished().model_copy(update={"costs": _costs(8)})]
    runs.append(finished("method=lora").model_copy(update={"costs": _costs(16, reference=5_000_000)}))
    said = _printed(capsys, monkeypatch, *runs)
    assert "No percentages: the runs have no common reference" in said
    assert " / " not in said
    assert "256.0 M" in said


def test_runs_without_costs_say_so(finished, capsys, monkeypatch: pytest.MonkeyPatch):
    assert "costs: not counted" in _printed(capsys, monkeypatch, finished())


def test_a_run_without_costs_says_so_beside_another(finished, capsys, monkeypatch: pytest.MonkeyPatch):
    counted = finished("method=lora").model_copy(update={"costs": _costs(8)})
    said = _printed(capsys, monkeypatch, finished(), counted)
    assert "bayesian-lora not" in said
    assert "100.0%" in said


def test_brackets_in_names_are_no_markup(finished, capsys, monkeypatch: pytest.MonkeyPatch):
    assert "[/red]" in _printed(capsys, monkeypatch, finished().model_copy(update={"method": "[/red]"}))


@pytest.mark.parametrize(
    ("columns", "room", "widths"),
    [
        ([["a b", "ccc"], ["dd"]], 20, [3, 2]),
        ([["one two", "x"], ["three four", "y"]], 12, [7, 5]),
        ([["one two"], ["three four"]], 9, [4, 5]),
        ([["longword"], ["ab"]], 6, [4, 2]),
        ([[""], ["ab"]], 6, [0, 2]),
    ],
)
def test_columns_keep_words_whole_and_widen_as_far_as_there_is_room(columns, room: int, widths: list[int]):
    assert column_widths(columns, room) == widths


def test_the_table_fits_a_narrow_terminal_without_cutting_names(finished, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_runs([finished(), finished("method=lora")])
    table = capsys.readouterr().out
    assert max(len(line) for line in table.splitlines()) <= 80
    for text in ("bayesian-lora", "lora", "trainable", "78.50"):
        assert text in table
    assert "…" not in table


def test_the_files_of_a_run_are_named_and_its_page_is_written(tmp_path: Path, finished, capsys):
    print_files(finished(), tmp_path)
    said = capsys.readouterr().out
    assert f"record: {tmp_path / 'record.json'}" in said
    assert f"page:   {tmp_path / 'report.html'}" in said
    assert (tmp_path / "report.html").is_file()


def test_a_page_that_cannot_be_written_does_not_undo_the_run(tmp_path: Path, finished, capsys):
    print_files(finished(), tmp_path / "missing")
    said = capsys.readouterr()
    assert "record: " in said.out
    assert "no page: " in said.err
