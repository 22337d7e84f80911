"""The driver of benchmarks/weight_change: same work for all methods, the choice of rates, the table; no training."""

import json
import sys
from pathlib import Path

import pytest

from rankbits.recipes.load import load
from rankbits.records import WeightChangeRecord

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "weight_change"


@pytest.fixture
def study(modules_of, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The driver with results in a temporary folder."""
    driver = modules_of("weight_change")("run")
    monkeypatch.setattr(driver, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(driver, "FIGURES", tmp_path / "figures")
    driver.RESULTS.mkdir()
    return driver


def _points(method: str, slope: float) -> list[WeightChangeRecord]:
    """Two checkpoints of two layers; with a slope of at least -1 no change is negative."""
    return [
        WeightChangeRecord(
            method=method,
            layer=f"layer.{layer}.{kind}",
            step=step,
            magnitude=1 + slope * direction,
            direction=direction,
        )
        for kind, direction_of in (("query", 0.01), ("value", 0.02))
        for layer in range(3)
        for step in (10, 60)
        if (direction := direction_of * (layer + 1) * step / 60)
    ]


def _store(study, method: str, rate: str, seed: int, score: float, slope: float) -> None:
    points = [point.model_dump() for point in _points(method, slope)]
    correlations = {kind: study.correlation(_points(method, slope), kind) for kind in study.KINDS}
    result = {"score": {"value": score}, "correlations": correlations, "points": points}
    (study.RESULTS / f"{method}-lr{rate}-seed{seed}.json").write_text(json.dumps(result), encoding="utf-8")


def test_methods_share_all_but_what_trains_and_its_rate(study) -> None:
    recipes = {method: load(study.RECIPE, study.changes_of(method, "1e-3", 43)) for method in study.RATES}
    full, lora, dora = (recipes[method] for method in ("full", "lora", "dora"))
    assert full.task == lora.task == dora.task
    assert full.training == lora.training == dora.training
    assert lora.adapter == dora.adapter
    assert (lora.adapter.r, lora.adapter.targets) == (8, list(study.KINDS))
    assert full.task.evaluate_on == "development"
    steps = full.training.epochs * full.task.train_rows / full.training.batch_size
    assert steps % full.training.save_steps == 0
    assert steps / full.training.save_steps == 5


def test_every_method_has_as_many_tries(study) -> None:
    assert len({len(rates) for rates in study.RATES.values()}) == 1


def test_the_rate_with_the_best_score_is_taken_for_all_seeds(study, capsys) -> None:
    for method, slope in (("full", -1.0), ("lora", 2.0), ("dora", -0.5)):
        low, high = study.RATES[method]
        _store(study, method, low, study.SEEDS[0], 80.0, slope)
        for seed in study.SEEDS:
            _store(study, method, high, seed, 81.0 + seed - study.SEEDS[0], slope)
    sys_argv, sys.argv = sys.argv, ["run.py"]
    try:
        assert study.main() == 0
    finally:
        sys.argv = sys_argv
    printed = capsys.readouterr().out
    assert f"| lora | {study.RATES['lora'][1]} | 82.00 ± 1.00 | 1.00 ± 0.00 |" in printed
    assert f"| dora | {study.RATES['dora'][1]} | 82.00 ± 1.00 | -1.00 ± 0.00 |" in printed
    drawn = (study.FIGURES / "magnitude-by-direction.csv").read_text(encoding="utf-8").splitlines()
    assert len(drawn) == 1 + sum(len(_points(method, 1.0)) for method in study.RATES)


def test_the_last_checkpoint_is_that_of_the_largest_step(study) -> None:
    assert {point.step for point in study.at_the_end(_points("lora", 1.0))} == {60}


def test_stored_correlations_are_those_of_the_stored_points(study) -> None:
    stored = sorted((FOLDER / "results").glob("*.json"))
    assert stored
    for path in stored:
        result = json.loads(path.read_text(encoding="utf-8"))
        points = study.points_of(result)
        assert len(points) == 5 * 6 * len(study.KINDS)
        for kind in study.KINDS:
            assert result["correlations"][kind] == pytest.approx(study.correlation(points, kind))
