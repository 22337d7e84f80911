"""What pytest needs to run PEFT's tests: offline, upstream's markers and warnings, no unlisted skip."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
HERE = Path(__file__).parent
sys.path.append(str(HERE))


def pytest_configure(config: pytest.Config) -> None:
    """Upstream's decorators use markers that strict marker checking would refuse."""
    for marker in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: a marker of PEFT's tests")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing PEFT's tests takes seconds: not when they are deselected anyway."""
    return True if "not conformance" in config.getoption("markexpr") and collection_path.suffix == ".py" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here as conformance; PEFT's tests are not written for warnings as errors."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.conformance)
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Upstream's models are so small that compiling our kernels for them would take longer than all the tests."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """A skip that is not on the list is a failure: it would hide a test that upstream switched off for us."""
    import cases

    report = yield
    if report.skipped and HERE in item.path.parents:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not cases.allowed(item.originalname, reason):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped, which is not on the list of legitimate skips: {reason}"
    return report
