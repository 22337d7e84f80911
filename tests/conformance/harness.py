"""Runs PEFT's own test classes over our configs: imports PEFT's tests as they are and swaps their tables of cases."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import peft
import pytest

PACKAGE = "peft_upstream_tests"
SOURCES = Path(__file__).parents[2] / ".cache" / "peft-tests" / f"peft-{peft.__version__}"

Test = types.FunctionType
Tables = Sequence[tuple[Any, Sequence[Any]]]


@dataclass(frozen=True)
class Group:
    """One of PEFT's test classes, and the names of the tables of cases in its module."""

    module: str
    test_class: str
    tables: tuple[str, ...]


GROUPS: Mapping[str, Group] = {
    "custom": Group("test_custom_models", "TestPeftCustomModel", ("TEST_CASES",)),
    "multi": Group("test_custom_models", "TestMultipleActiveAdapters", ("MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES",)),
    "config": Group("test_config", "TestPeftConfig", ("ALL_CONFIG_CLASSES",)),
    "decoder": Group("test_decoder_models", "TestDecoderModels", ("ALL_CONFIGS", "PEFT_DECODER_MODELS_TO_TEST")),
    "quantization": Group("test_quantization", "TestQuantization", ("TEST_CASES", "QUANTIZATION_BACKENDS")),
}


@dataclass(frozen=True)
class Cases:
    """What replaces the tables of one group.

    Args:
        tables: for each table of the group, in its order, the rows that take its place.
        minimum: how many tests must at least be collected; fewer means that upstream rebuilt a table.
        drop: test names left out -> why.
        narrow: test name -> name of one of its other parameters -> the values kept.
    """

    tables: tuple[Sequence[Any], ...]
    minimum: int
    drop: Mapping[str, str] = field(default_factory=dict)
    narrow: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)


def sources() -> Path:
    """The unpacked source distribution of PEFT: $RANKBITS_PEFT_TESTS, else the folder that `make conformance` fills.

    Raises:
        pytest.fail.Exception: it is missing, or of another version than the installed PEFT.
    """
    root = Path(os.environ.get("RANKBITS_PEFT_TESTS", SOURCES))
    if not (root / "tests" / "testing_common.py").is_file():
        pytest.fail(f"PEFT's tests are not in {root}: run `make conformance`, which fetches them.", pytrace=False)
    given = HeaderParser().parsestr((root / "PKG-INFO").read_text(encoding="utf-8"))["Version"]
    if given != peft.__version__:
        pytest.fail(f"PEFT's tests in {root} are of {given}, installed is {peft.__version__}: run `make conformance`.")
    return root


@contextlib.contextmanager
def _diffusers_stub() -> Iterator[None]:
    """One upstream module imports one class of diffusers for an isinstance test; a stand-in is enough."""
    if importlib.util.find_spec("diffusers") is not None:
        yield
        return
    stub = types.ModuleType("diffusers")
    stub.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules["diffusers"] = stub
    try:
        yield
    finally:
        del sys.modules["diffusers"]


@functools.cache
def upstream(module: str) -> types.ModuleType:
    """Import one module of PEFT's tests under an alias package: its relative imports work, and no name clashes."""
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(sources() / "tests")]
        sys.modules[PACKAGE] = package
    with warnings.catch_warnings(), _diffusers_stub():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{PACKAGE}.{module}")


def _swapped(test: Test, tables: Tables, narrow: Mapping[str, Sequence[Any]]) -> Test | None:
    """A copy of an upstream test with our rows in place of upstream's; None if it uses none of the tables."""
    ours = {id(upstream_rows): rows for upstream_rows, rows in tables}
    upstream_marks = getattr(test, "pytestmark", [])
    if not any(mark.name == "parametrize" and id(mark.args[1]) in ours for mark in upstream_marks):
        return None
    marks = []
    for mark in upstream_marks:
        if mark.name == "parametrize":
            rows = ours.get(id(mark.args[1]), narrow.get(mark.args[0], mark.args[1]))
            marks.append(pytest.mark.parametrize(mark.args[0], rows, **mark.kwargs).mark)
        else:
            marks.append(mark)
    copy = types.FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copy.__kwdefaults__ = test.__kwdefaults__
    copy.__dict__.update(test.__dict__, pytestmark=marks)
    return copy


def conformance(group: str, cases: Cases) -> type:
    """A subclass of the group's upstream test class that runs over `cases` only. Upstream objects stay untouched.

    Raises:
        ValueError: a test to be dropped does not exist.
        pytest.fail.Exception: fewer tests than `cases.minimum` are left.
    """
    place = GROUPS[group]
    module = upstream(place.module)
    base = getattr(module, place.test_class)
    tables = [(getattr(module, name), rows) for name, rows in zip(place.tables, cases.tables, strict=True)]
    tests = {name: getattr(base, name) for name in dir(base) if name.startswith("test")}
    unknown = {*cases.drop, *cases.narrow} - set(tests)
    if unknown:
        raise ValueError(f"{place.test_class} has no tests {sorted(unknown)}; they are named to be dropped or narrowed")
    kept = {name: _swapped(test, tables, cases.narrow.get(name, {})) for name, test in tests.items()}
    namespace = {name: None if name in cases.drop else test for name, test in kept.items()}
    test_class = type(f"Test{group.title()}", (base,), namespace)
    if size(test_class) < cases.minimum:
        pytest.fail(
            f"{size(test_class)} tests left of {place.test_class}, expected at least {cases.minimum}: see {module}"
        )
    return test_class


def skip_merging(refuses: Callable[[type, Mapping[str, Any]], bool], reason: str) -> None:
    """Skip every upstream test that merges, from the point where it does, for configs whose method refuses to merge.

    Args:
        refuses: whether a config of this class with these arguments refuses.
        reason: why the test is skipped.
    """
    common = upstream("testing_common")
    original = common._skip_if_merging_not_supported

    def skip(model_id: str, config_cls: type, config_kwargs: Mapping[str, Any]) -> None:
        original(model_id, config_cls, config_kwargs)
        if refuses(config_cls, config_kwargs):
            pytest.skip(reason)

    for module in (common, upstream("test_custom_models")):
        module._skip_if_merging_not_supported = skip


def size(test_class: type) -> int:
    """How many tests pytest collects from a class that `conformance` made."""
    total = 0
    for name in dir(test_class):
        test = getattr(test_class, name)
        if name.startswith("test") and test is not None:
            rows = 1
            for mark in test.pytestmark:
                rows *= len(mark.args[1]) if mark.name == "parametrize" else 1
            total += rows
    return total
