"""Changes one line of one function for a while, and counts which of PEFT's tests notice."""

from __future__ import annotations
import __future__

import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Line:
    """Text of one method, replaced.

    Args:
        place: `module:Class.method`.
        old: text that occurs exactly once in the method.
        new: what takes its place.
    """

    place: str
    old: str
    new: str


@dataclass(frozen=True)
class Value:
    """An attribute of a class, set.

    Args:
        place: `module:Class.attribute`.
        value: what it is instead.
    """

    place: str
    value: Any


@dataclass(frozen=True)
class Mutant:
    """One behaviour of the tuner, broken.

    Args:
        name: what is broken.
        edits: how.
        tests: where to look: node ids below the folder, each of a class or of one test of it.
    """

    name: str
    edits: tuple[Line | Value, ...]
    tests: tuple[str, ...]


@dataclass
class Outcomes:
    """A pytest plugin that remembers the node ids of what passed and failed."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)


def rewritten(function: Callable[..., Any], owner: type, old: str, new: str) -> Callable[..., Any]:
    """The function compiled anew from its source with `old` replaced by `new`; `super()` still finds `owner`.

    Raises:
        ValueError: the source does not hold `old` exactly once, so the mutant no longer is what its name says.
    """
    source = textwrap.dedent(inspect.getsource(function))
    source = source[source.index("def ") :]
    if source.count(old) != 1:
        raise ValueError(f"{function.__qualname__} holds {old!r} {source.count(old)} times, expected once: {source}")
    nested = (
        f"def build(__class__):\n{textwrap.indent(source.replace(old, new), '    ')}\n    return {function.__name__}\n"
    )
    flags = __future__.annotations.compiler_flag
    scope: dict[str, Any] = {}
    exec(compile(nested, f"<mutant of {function.__qualname__}>", "exec", flags), function.__globals__, scope)
    return scope["build"](owner)


@contextlib.contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """The mutant is in force inside the context and gone after it."""
    with pytest.MonkeyPatch.context() as patch:
        for edit in mutant.edits:
            module_name, _, path = edit.place.partition(":")
            class_name, _, attribute = path.partition(".")
            owner = getattr(importlib.import_module(module_name), class_name)
            if isinstance(edit, Value):
                patch.setattr(owner, attribute, edit.value, raising=False)
            else:
                method = inspect.getattr_static(owner, attribute)
                wrap = type(method) if isinstance(method, classmethod | staticmethod) else lambda function: function
                changed = rewritten(inspect.unwrap(method), owner, edit.old, edit.new)
                patch.setattr(owner, attribute, wrap(changed))
        yield


def run(tests: tuple[str, ...], *, stop: bool) -> Outcomes:
    """Run some of the conformance tests in this process.

    Args:
        tests: node ids below this folder.
        stop: stop at the first failure.
    """
    outcomes = Outcomes()
    options = ["-qq", "-rN", "--tb=no", "-W", "ignore", "-p", "no:cacheprovider", f"--maxfail={1 if stop else 0}"]
    pytest.main([*options, *(str(HERE / test) for test in tests)], plugins=[outcomes])
    return outcomes
