"""The harness itself: nothing may make a group of PEFT's tests disappear quietly."""

from __future__ import annotations

import shutil
from pathlib import Path

import cases
import harness
import mutation
import pytest
from peft import MissConfig

MISS = cases.Method(MissConfig)


def test_missing_sources_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("RANKBITS_PEFT_TESTS", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="run `make conformance`"):
        harness.sources()


def test_sources_of_another_version_are_refused(monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "testing_common.py").touch()
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    monkeypatch.setenv("RANKBITS_PEFT_TESTS", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"of 0\.1\.0, installed is"):
        harness.sources()


def test_a_table_that_upstream_rebuilt_is_noticed(monkeypatch):
    upstream = harness.upstream("test_config")
    monkeypatch.setattr(upstream, "ALL_CONFIG_CLASSES", list(upstream.ALL_CONFIG_CLASSES))
    with pytest.raises(pytest.fail.Exception, match="0 tests left of TestPeftConfig"):
        harness.conformance("config", cases.config(MISS))


def test_a_drop_that_names_no_test_is_refused():
    with pytest.raises(ValueError, match="test_misspelt"):
        harness.conformance("config", harness.Cases(([(MissConfig, {})],), 1, {"test_misspelt": "for the test"}))


def test_upstream_keeps_its_tables():
    upstream = harness.upstream("test_config")
    ours = harness.conformance("config", cases.config(MISS))
    theirs = upstream.TestPeftConfig.test_methods.pytestmark
    assert theirs[0].args[1] is upstream.ALL_CONFIG_CLASSES
    assert [len(mark.args[1]) for mark in ours.test_methods.pytestmark] == [1]


def test_a_dropped_test_and_a_test_without_our_tables_are_gone():
    ours = harness.conformance("config", cases.config(MISS))
    assert ours.test_from_pretrained is None
    assert ours.test_adalora_config_invalid_total_step_raises is None


@pytest.mark.parametrize(("reason", "failed"), [("too lazy", 1), (f"MLP: {cases.REFUSED}", 0)])
def test_a_skip_that_is_not_listed_is_a_failure(tmp_path, reason, failed):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    conformance: here\n")
    (tmp_path / "test_skipping.py").write_text(f"import pytest\n\n\ndef test_it():\n    pytest.skip({reason!r})\n")
    outcomes = mutation.Outcomes()
    pytest.main(["-p", "no:terminal", "-c", str(tmp_path / "pytest.ini"), str(tmp_path)], plugins=[outcomes])
    assert len(outcomes.failed) == failed


class Sum:
    """Something to mutate."""

    def start(self) -> int:
        return 1


class LongerSum(Sum):
    """Something to mutate that calls `super()`."""

    def start(self) -> int:
        return super().start() + 1


def test_a_mutant_changes_one_place_and_keeps_super():
    changed = mutation.rewritten(LongerSum.start, LongerSum, "+ 1", "- 1")
    assert changed(LongerSum()) == 0
    assert LongerSum().start() == 2


def test_a_mutant_that_no_longer_applies_is_refused():
    with pytest.raises(ValueError, match="0 times, expected once"):
        mutation.rewritten(LongerSum.start, LongerSum, "+ 2", "- 2")
