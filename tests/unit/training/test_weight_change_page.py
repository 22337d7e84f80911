"""The page about magnitude and direction does what it says."""

import re
from pathlib import Path

import pytest

from rankbits.records import WeightChangeRecord

PAGE = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "magnitude-and-direction.md"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_the_snippets_run_one_after_the_other(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(snippets) == 3
    scope: dict = {}
    for snippet in snippets:
        exec(snippet, scope)
    points: list[WeightChangeRecord] = scope["callback"].points
    first = [(point.step, point.kind) for point in points[:12]]
    assert first == [(step, kind) for step in (2, 4, 6) for kind in ("query", "value") * 2]
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".svg", ".png", ".csv"}
    assert all(change.magnitude > 0 for change in scope["changes"].values())
