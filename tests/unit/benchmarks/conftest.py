"""How tests reach the benchmarks, which are scripts: folders of modules that have the same names in all of them."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def modules_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Callable[[str], ModuleType]]]:
    """From the name of a benchmark to what imports its modules; afresh in each test, and none of them stays."""

    def enter(benchmark: str) -> Callable[[str], ModuleType]:
        _forget()
        monkeypatch.syspath_prepend(str(BENCHMARKS / benchmark))
        return importlib.import_module

    yield enter
    _forget()


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if BENCHMARKS in Path(getattr(module, "__file__", None) or "").parents:
            del sys.modules[name]
