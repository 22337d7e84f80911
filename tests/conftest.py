"""What every test runs under: eager kernels, one thread, and property tests that draw the same examples each time."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Sums depend on the number of threads in the last bits: processes that tests start compute with one as well.
os.environ["OMP_NUM_THREADS"] = "1"
# Compiling the kernels takes longer than most tests; those that mean the compiled code set the switch themselves.
os.environ.setdefault("RANKBITS_COMPILE", "0")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("rankbits", deadline=None, derandomize=True, database=None, print_blob=False)
settings.load_profile("rankbits")


LEAVE = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
"""Ends a program without PyTorch's teardown, in which a process was seen to abort when all had been said."""


@pytest.fixture
def two_processes(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs a program twice at once and gives what each prints; its arguments are rank, store for gloo, and more."""

    def run(program: str, *arguments: str, **environment: str) -> list[str]:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program + LEAVE, str(rank), str(tmp_path / "store"), *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **environment},
            )
            for rank in range(2)
        ]
        try:
            outputs = [process.communicate(timeout=600) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], outputs
        return [printed for printed, _ in outputs]

    return run
