"""What is said when a run has ended."""

from pathlib import Path

import pytest

from rankbits.cli.running import print_files, print_runs


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
