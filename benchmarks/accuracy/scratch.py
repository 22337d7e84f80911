"""Where unfinished work lies: run folders, logs, and locks that the system lets go when their process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SCRATCH_VARIABLE = "RANKBITS_SCRATCH"


def scratch() -> Path:
    """$RANKBITS_SCRATCH, or `runs/accuracy` of the repository, which git ignores."""
    given = os.environ.get(SCRATCH_VARIABLE)
    return Path(given) if given else HERE.parents[1] / "runs" / "accuracy"


def run_folder(name: str) -> Path:
    """Where the run of a point keeps its checkpoints and its adapter."""
    return scratch() / name


def log_file(name: str) -> Path:
    """What a point's process says."""
    return scratch() / "logs" / f"{name}.log"


def result_file(name: str) -> Path:
    """The finished result of a point."""
    return RESULTS / f"{name}.json"


@contextmanager
def claimed(name: str) -> Iterator[bool]:
    """Whether this process now is the only one at a point; it stays so inside the block.

    The claim is a lock on an open file, not the file itself: it ends with the process, however that ends, so that no
    file left behind by a killed process keeps others out.
    """
    folder = scratch() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def is_running(name: str) -> bool:
    """Whether another process is at a point."""
    with claimed(name) as mine:
        return not mine
