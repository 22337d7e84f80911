"""The list of tasks: what it holds, what it costs to read, and what a wrong name gets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rankbits import tasks
from rankbits.errors import TaskError

GLUE = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
NAMES = [*GLUE, "film-reviews", "gsm8k", "e2e_nlg", "memorisation"]


def test_every_task_is_listed_and_found_under_its_own_name() -> None:
    assert tasks.names() == NAMES
    assert [tasks.get(name).name for name in NAMES] == NAMES


@pytest.mark.parametrize(("given", "near"), [("sst-2", "sst2"), ("STSB", "stsb"), ("film_reviews", "film-reviews")])
def test_an_unknown_task_gets_the_nearest_name_and_all_names(given: str, near: str) -> None:
    with pytest.raises(TaskError) as caught:
        tasks.get(given)
    assert f"unknown task {given!r} (did you mean {near!r}?)" in str(caught.value)
    assert ", ".join(NAMES) in str(caught.value)


def test_a_name_like_none_gets_no_guess() -> None:
    with pytest.raises(TaskError, match=r"^unknown task 'zzzz'; known tasks: cola"):
        tasks.get("zzzz")


def test_listing_tasks_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rankbits import tasks; tasks.get(tasks.names()[0]); "
        "print(sorted({'torch', 'datasets', 'sklearn', 'scipy', 'numpy', 'pyarrow', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
