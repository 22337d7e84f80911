"""What benchmarks say to a pattern that no point has, and where their data is not named; nothing is trained."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
MODULES = {"decoder": ("points", "rounding", "run"), "methods": ("points", "results", "run")}


@pytest.fixture
def main(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """What a command of a benchmark runs, imported afresh; nothing of it stays."""
    name = request.param
    monkeypatch.syspath_prepend(str(BENCHMARKS / name))
    for module in MODULES[name]:
        monkeypatch.delitem(sys.modules, module, raising=False)
    run = importlib.import_module("run")
    monkeypatch.setattr(run, "work", lambda *_: pytest.fail("started"))
    yield run.main
    for module in MODULES[name]:
        sys.modules.pop(module, None)


@pytest.mark.parametrize("main", MODULES, indirect=True)
@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [("no-such-point", "'no-such-point'; --list shows their names"), ("lora", "RANKBITS_DATA is not set")],
)
def test_what_cannot_run_is_refused_at_once(main, pattern, complaint, monkeypatch, capsys) -> None:
    monkeypatch.delenv("RANKBITS_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", pattern])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
