"""What we measure: benchmarks, where their rows come from and how their predictions are scored."""

from __future__ import annotations

from rankbits.tasks.loading import TaskData, load
from rankbits.tasks.registry import get, names
from rankbits.tasks.task import Task

__all__ = ["Task", "TaskData", "get", "load", "names"]
