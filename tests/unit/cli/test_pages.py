"""`rankbits report`: which page it writes and where its links lead."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rankbits.cli.main import app
from rankbits.cli.pages import recipe_link
from rankbits.records import RunRecord


@pytest.fixture
def run(tmp_path: Path, finished) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    finished().write(folder / "record.json")
    return folder


def _report(*arguments: object):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_one_run_gets_its_page_beside_its_record(run: Path):
    result = _report(run)
    assert result.exit_code == 0, result.stderr
    assert str(run / "report.html") in result.stdout
    assert 'href="record.json"' in (run / "report.html").read_text(encoding="utf-8")


def test_a_page_elsewhere_links_back(run: Path, tmp_path: Path):
    (run / "recipe.yaml").write_text("")
    assert _report(run, "--output", tmp_path / "page.html").exit_code == 0
    assert 'href="run/recipe.yaml"' in (tmp_path / "page.html").read_text(encoding="utf-8")


def _learned(folder: Path) -> RunRecord:
    """The record of a run, with a history that can be drawn."""
    record = RunRecord.read(folder / "record.json")
    (folder / "record.json").unlink()
    drawn = record.model_copy(update={"history": [{"step": 1.0, "loss": 0.7}, {"step": 2.0, "loss": 0.5}]})
    drawn.write(folder / "record.json")
    return drawn


def test_figures_lie_beside_the_page_and_are_linked(run: Path):
    _learned(run)
    result = _report(run)
    assert f"figures: {run / 'figures'}" in result.stdout
    assert sorted(path.name for path in (run / "figures").iterdir()) == ["training.csv", "training.png", "training.svg"]
    assert 'href="figures/training.svg"' in (run / "report.html").read_text(encoding="utf-8")


def test_figures_go_where_they_are_wanted(run: Path, tmp_path: Path):
    _learned(run)
    assert _report(run, "--figures", tmp_path / "for paper").exit_code == 0
    assert (tmp_path / "for paper" / "training.csv").is_file()
    assert not (run / "figures").exists()
    assert 'href="../for%20paper/training.png"' in (run / "report.html").read_text(encoding="utf-8")


def test_without_figures_there_is_no_folder(run: Path):
    assert "figures: " not in _report(run).stdout
    assert not (run / "figures").exists()


def test_a_folder_of_figures_that_cannot_be_made_is_named(run: Path):
    _learned(run)
    result = _report(run, "--figures", run / "record.json")
    assert result.exit_code == 2
    assert "record.json: cannot be made" in result.stderr
    assert not (run / "report.html").exists()


def test_several_runs_need_a_name_for_their_page(run: Path, tmp_path: Path, finished):
    other = tmp_path / "other"
    other.mkdir()
    finished("method=lora").write(other / "record.json")
    result = _report(run, other)
    assert result.exit_code == 2
    assert "--output" in result.stderr
    assert _report(run, other, "--output", tmp_path / "both.html").exit_code == 0
    assert "bayesian-lora" in (tmp_path / "both.html").read_text(encoding="utf-8")


def test_a_page_is_never_written_over_a_record(run: Path):
    before = (run / "record.json").read_bytes()
    result = _report(run, "--output", run / "record.json")
    assert result.exit_code == 2
    assert "expected a file that ends in .html" in result.stderr
    assert (run / "record.json").read_bytes() == before


def test_a_folder_without_a_record(tmp_path: Path):
    result = _report(tmp_path)
    assert result.exit_code == 2
    assert str(tmp_path / "record.json") in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_file_comes_before_the_record(tmp_path: Path):
    (tmp_path / "record.json").write_text("")
    assert recipe_link(tmp_path, tmp_path / "report.html") == "record.json"
    (tmp_path / "recipe.yaml").write_text("")
    assert recipe_link(tmp_path, tmp_path / "report.html") == "recipe.yaml"
    assert recipe_link(tmp_path, tmp_path / "pages" / "report.html") == "../recipe.yaml"
