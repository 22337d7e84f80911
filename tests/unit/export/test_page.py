"""The page about exports does what it says."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "export-to-plain-lora.md"


def test_the_snippets_run_one_after_the_other(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 2
    scope: dict = {}
    for snippet in snippets:
        exec(snippet, scope)
    assert scope["tuned"].peft_config["default"].r == 3
    assert str(scope["exported"].verification).startswith("reloaded with peft ")


def test_the_formats_of_the_page_are_those_there_are() -> None:
    from rankbits.export import Format

    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert rows == [known.value for known in Format]
