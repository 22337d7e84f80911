"""The verbs that load nothing: validate, list, --help and --version; and wrong arguments to the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rankbits.cli.main
from rankbits import tasks
from rankbits.cli.main import app
from rankbits.recipes.catalogue import EMBEDDED_MODELS, METHODS, method_names
from rankbits.recipes.load import load
from rankbits.recipes.shipped import bases, names

SOURCES = Path(rankbits.cli.main.__file__).parents[2]
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "sklearn", "scipy", "matplotlib")


def _run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_validate_prints_a_recipe_that_is_valid_itself(tmp_path: Path):
    result = _run("validate", "glue/minilm/stsb", "training.seed=7")
    assert result.exit_code == 0
    assert result.stdout.endswith("# valid\n")
    (tmp_path / "again.yaml").write_text(result.stdout, encoding="utf-8")
    assert load(str(tmp_path / "again.yaml")) == load("glue/minilm/stsb", ["training.seed=7"])


@pytest.mark.parametrize("verb", ["validate", "train"])
def test_a_wrong_recipe_is_one_message_and_exit_2(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = _run(verb, "quickstart", "training.epohcs=3", "task.name=stbs")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: recipe quickstart has 2 problems:\n")
    assert list(tmp_path.iterdir()) == []


def test_the_quickstart_refuses_a_wrong_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = _run("quickstart", "adapter.r=0")
    assert result.exit_code == 2
    assert "adapter.r: given 0" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_list_recipes_describes_them_and_marks_those_that_cannot_be_run():
    told = _run("list", "recipes").stdout
    lines = [line for line in told.splitlines() if not line.startswith(" ")]
    assert lines[: len(names())] == names()
    assert lines[len(names()) :] == [f"{name} (cannot be run: others extend it)" for name in bases()]
    for name in names():
        assert f"{name}\n  {load(name).description}\n" in told
    assert "glue/minilm-paper/stsb\n  STS-B with the embedded MiniLM encoder and the penalties of the" in told


def test_list_methods_tasks_and_models():
    methods, known_tasks, models = (_run("list", kind).stdout for kind in ("methods", "tasks", "models"))
    assert [line for line in methods.splitlines() if not line.startswith(" ")] == method_names()
    for known in METHODS:
        told = [f"  {key + ':':8} {getattr(known, key)}" for key in ("trains", "learns", "merges", "exports", "paper")]
        assert "\n".join([known.name, *told]) in methods
    assert [line for line in known_tasks.splitlines() if not line.startswith(" ")] == tasks.names()
    assert tasks.get("stsb").description in known_tasks
    assert EMBEDDED_MODELS[0].file.install_command in models
    assert "hub id" in models


@pytest.mark.parametrize("arguments", [["list", "recipe"], ["nothing"], ["validate"], ["train"]])
def test_wrong_arguments_exit_2(arguments: list[str]):
    assert _run(*arguments).exit_code == 2


def test_every_verb_is_there():
    result = _run("--help")
    assert result.exit_code == 0
    for verb in ("quickstart", "train", "evaluate", "report", "export", "validate", "list"):
        assert verb in result.stdout


def test_version():
    result = _run("--version")
    assert result.exit_code == 0
    assert result.stdout.strip()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["validate", "quickstart"], ["list", "recipes"], ["list", "tasks"]],
)
def test_light_verbs_import_nothing_heavy(arguments: list[str]):
    code = (
        "import json, sys\n"
        "from rankbits.cli.main import app\n"
        "try:\n    app(json.loads(sys.argv[1]))\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)], capture_output=True, text=True, check=True, env=environment
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & set(HEAVY)
