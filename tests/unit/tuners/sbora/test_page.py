"""The page about several tasks in one base does what it says."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[4] / "docs" / "how-to" / "several-tasks-in-one-base.md"


def test_the_snippets_run_one_after_the_other() -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(snippets) == 2
    scope: dict = {}
    for snippet in snippets:
        exec(snippet, scope)
    assert {task: config.first for task, config in scope["configs"].items()} == {"reviews": 0, "questions": 16}
