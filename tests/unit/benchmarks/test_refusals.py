"""What benchmarks say to a pattern that no point has, and where their data is not named; nothing is trained."""

import sys

import pytest


@pytest.mark.parametrize("benchmark", ["decoder", "methods"])
@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [("no-such-point", "'no-such-point'; --list shows their names"), ("lora", "RANKBITS_DATA is not set")],
)
def test_what_cannot_run_is_refused_at_once(benchmark, pattern, complaint, modules_of, monkeypatch, capsys) -> None:
    run = modules_of(benchmark)("run")
    monkeypatch.setattr(run, "work", lambda *_: pytest.fail("started"))
    monkeypatch.delenv("RANKBITS_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", pattern])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
