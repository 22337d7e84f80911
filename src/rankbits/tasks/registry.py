"""The tasks that there are, by name."""

from __future__ import annotations

import difflib

from rankbits.errors import TaskError
from rankbits.tasks import completions, film_reviews, glue, memorisation
from rankbits.tasks.task import Task

_TASKS = {task.name: task for task in (*glue.TASKS, film_reviews.TASK, *completions.TASKS, memorisation.TASK)}


def names() -> list[str]:
    """Names of all tasks, GLUE first and those of language models last."""
    return list(_TASKS)


def get(name: str) -> Task:
    """The task of that name.

    Raises:
        TaskError: there is none; the message holds the nearest name and all names.
    """
    if name in _TASKS:
        return _TASKS[name]
    near = difflib.get_close_matches(name.lower(), _TASKS, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise TaskError(f"unknown task {name!r}{hint}; known tasks: {', '.join(_TASKS)}")
