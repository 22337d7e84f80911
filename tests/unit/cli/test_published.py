"""`rankbits published`: tables of eighty columns, JSON, and an exit code that a false verdict changes."""

import json
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from rankbits.accounting import published as tables
from rankbits.accounting.published import PublishedTable, Verdict
from rankbits.cli.published import published


@pytest.fixture
def run():
    app = typer.Typer()
    app.command("published")(published)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("table", [each.value for each in PublishedTable])
def test_a_table_fits_eighty_columns_and_names_every_verdict(run, table: str):
    result = run(table)
    assert result.exit_code == 0
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    assert result.stdout.startswith(f"{table}: ")
    cells = tables.rows(PublishedTable(table))
    for verdict in {row.verdict for row in cells}:
        assert verdict.value in result.stdout
    assert f"\n{len(cells)} cells: " in result.stdout


def test_numbers_reasons_and_inputs_are_printed(run):
    result = run("table2")
    line = next(line for line in result.stdout.splitlines() if "q+ra MRPC" in line and "misprint" in line)
    assert line.split() == ["q+ra", "MRPC", "36.99%", "36.9432%", "misprint", "7"]
    assert "  7  One of the two MRPC cells of this row is off by 0.05" in result.stdout
    assert result.stdout.count("from training   input") == 16
    assert "35 cells: 18 reproduced, 1 misprint, 16 input" in result.stdout


def test_a_count_is_printed_with_all_its_digits(run):
    lines = run("parameters").stdout.splitlines()
    assert any(line.split()[-4:-1] == ["0.8M", "786,432", "reproduced"] for line in lines)
    assert any("0.191510...%" in line and "0.1915%" in line for line in lines)


def test_all_tables_without_an_argument(run):
    starts = [line.split(":")[0] for line in run().stdout.splitlines() if line.startswith(("table", "parameters:"))]
    assert starts == ["table1", "table2", "parameters"]


def test_json_has_every_cell_with_exact_values(run):
    result = run("--json")
    assert result.exit_code == 0
    listed = json.loads(result.stdout)
    assert len(listed) == sum(len(tables.rows(table)) for table in PublishedTable)
    assert {entry["of"] for entry in listed} == {"table1", "table2", "parameters", "memory"}
    full = next(entry for entry in listed if entry["cell"] == "deberta-v3-base: full")
    assert (full["recomputed"], full["verdict_holds"]) == (184_423_682, True)
    assert [entry["of"] for entry in json.loads(run("table1", "--json").stdout)] == ["table1"] * 17


def test_json_says_under_which_conditions_a_percentage_holds(run):
    for entry in json.loads(run("table2", "--json").stdout):
        assert "T = S = 20 tokens, batch 1, 512 position rows recomputed, adapters unmerged" in entry["conditions"]


@pytest.mark.parametrize("arguments", [("table1",), ("table1", "--json")])
def test_a_verdict_that_does_not_hold_is_an_error_and_exit_1(run, monkeypatch: pytest.MonkeyPatch, arguments):
    good = tables.rows(PublishedTable.TABLE1)
    assert good[0].verdict is Verdict.REPRODUCED
    broken = [replace(good[0], recomputed=1), *good[1:]]
    monkeypatch.setattr(tables, "rows", lambda table: broken)
    result = run(*arguments)
    assert result.exit_code == 1
    assert "error: Bayesian-LoRA, Table 1: deberta-v3-base: full is marked 'reproduced' and is not" in result.stderr
    assert result.stdout


def test_an_unknown_table_is_refused(run):
    result = run("table3")
    assert result.exit_code == 2
    assert "table3" in result.stderr
