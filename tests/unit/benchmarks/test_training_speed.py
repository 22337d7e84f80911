"""The arithmetic of benchmarks/training_speed and the recipes of its sides, without any training."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "training_speed"
MODULES = ("run", "sides", "measure", "points")


@pytest.fixture
def study(monkeypatch):
    """The benchmark's modules, imported afresh: other benchmarks have modules of these names, too."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    for name in MODULES:
        sys.modules.pop(name, None)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES[:3]})
    for name in MODULES:
        sys.modules.pop(name, None)


def test_the_ratio_is_that_of_medians_and_the_quartiles_those_of_rounds(study):
    theirs, ours = [1.0, 2.0, 4.0], [1.5, 2.2, 4.0]
    ratio, low, high = study.run.compared(ours, theirs)
    assert ratio == pytest.approx(1.1)
    assert (low, high) == (1.0, 1.5)


def test_a_broken_promise_is_named(study, capsys):
    missed = []
    slow = {
        "seconds": {
            "sampled": {"lora": [1.0] * 5, "q-ra": [1.31] * 5},
            "fixed": {"lora": [1.0] * 5, "q-ra": [1.05] * 5},
        }
    }
    (case,) = [case for case in study.run.STEPS if case.label == "steps-all-q-ra"]
    study.run.step_rows(case, slow, missed)
    assert missed == ["steps-all-q-ra sampled: 1.310, at most 1.3 was promised"]
    taken = {"reference": [1.0] * 3, "fused": [0.1] * 3, "copy": [0.01] * 3}
    taken |= {"fused, forward": [0.05] * 3, "one width, forward": [0.02] * 3}
    study.run.kernel_rows({"seconds": {"2048 x 384": taken}}, missed)
    assert missed[1:] == ["quantizer on 2048 x 384: 10.0 times faster, at least 12.0 were promised"]
    study.run.peak_rows({"peak-all-lora": {"peak_bytes": 100}, "peak-all-q-ra": {"peak_bytes": 131}}, missed)
    assert missed[2:] == ["peak memory, all: 1.310, at most 1.3 was promised"]
    assert "| 1.310 | 1.310 to 1.310 | 1.3 |" in capsys.readouterr().out


def test_every_case_has_one_name(study):
    labels = [case.label for case in study.run.CASES]
    assert len(set(labels)) == len(labels)


def test_rounds_alternate_their_order(study):
    calls = []
    taken = study.measure.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls[2 * study.measure.WARM_UP :] == ["a", "b", "b", "a"]
    assert {name: len(values) for name, values in taken.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("modules", ["qkv", "all"])
def test_both_sides_adapt_the_same_modules_with_the_same_rank(study, modules):
    """And ours is the recipe of the accuracy study, calibration and targets aside."""
    sides = study.sides
    lora, ours, ranks = (sides.recipe(v, (sides.MODULES[modules],)) for v in ("lora", "q-ra", "ra"))
    assert (lora.method, ours.method) == ("lora", "bayesian-lora")
    for name in ("r", "alpha", "targets", "dropout", "modules_to_save"):
        assert getattr(lora.adapter, name) == getattr(ours.adapter, name) == getattr(ranks.adapter, name)
    assert not ranks.adapter.learn_bits
    studied = sides.load(sides.POINT.recipe, sides.POINT.changes)
    assert ours.gates == studied.gates
    changed = {"calibration_passes", "targets"}
    assert ours.adapter.model_dump(exclude=changed) == studied.adapter.model_dump(exclude=changed)
