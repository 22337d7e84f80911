"""The comparison of benchmarks/methods: points and floors, without any training."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rankbits.recipes.catalogue import method_names
from rankbits.recipes.load import load


@pytest.fixture
def study(modules_of, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The benchmark's modules with results in a temporary folder."""
    load = modules_of("methods")
    points, results = load("points"), load("results")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return SimpleNamespace(points=points, results=results, folder=tmp_path)


def _store(study, point, value: float, *, metric: str = "pearson") -> None:
    recipe = {"training": {"learning_rate": 1e-3}}
    result = {
        "scores": [{"metric": metric, "value": value, "primary": True}],
        "recipe": recipe,
        "parameters": {"trainable": 1000, "head": 10},
        "training": {"seconds": 60.0},
    }
    study.results.path_of(point).write_text(json.dumps(result), encoding="utf-8")


def _point(study, task: str, method: str, seed: int = 42):
    return next(p for p in study.points.POINTS if (p.task, p.method, p.seed) == (task, method, seed))


def test_every_method_has_three_seeds_of_the_encoder_and_one_of_the_decoder(study) -> None:
    for method in method_names():
        seeds = [point.seed for point in study.points.POINTS if (point.task, point.method) == ("stsb", method)]
        assert seeds == [42, 43, 44]
        decoded = [point.seed for point in study.points.POINTS if (point.task, point.method) == ("e2e_nlg", method)]
        assert decoded == ([] if method == "feature-based" else [42])
    assert len({point.name for point in study.points.POINTS}) == len(study.points.POINTS)


def test_every_method_makes_as_many_steps_from_the_model_with_the_trained_head(study) -> None:
    long = ("feature-based-long", "prefix", "prompt")
    for point in study.points.POINTS:
        recipe = load(point.recipe, list(point.changes))
        assert recipe.method in (point.method, "feature-based")
        assert (recipe.task.name, recipe.training.seed) == (point.task, point.seed)
        assert recipe.task.evaluate_on == "validation"
        if point.task == "e2e_nlg":
            assert recipe.training.max_steps <= 60
            assert point.start is None
        elif point.method in ("untrained", "head"):
            assert point.start is None
        else:
            made = (recipe.training.epochs, recipe.task.train_rows, recipe.training.batch_size)
            assert made == ((4, None, 16) if point.method in long else (1, 960, 8))
            assert point.start.name == f"stsb-head-seed{point.seed}"


def test_a_method_is_held_to_the_frozen_encoder_and_that_to_a_fresh_head(study) -> None:
    for seed, noise in ((42, 0.0), (43, 0.5), (44, -0.5)):
        _store(study, _point(study, "stsb", "untrained", seed), 0.0)
        _store(study, _point(study, "stsb", "feature-based", seed), 40.0 + noise)
        _store(study, _point(study, "stsb", "lora", seed), 70.0)
        _store(study, _point(study, "stsb", "feature-based-long", seed), 45.0 + noise)
        _store(study, _point(study, "stsb", "top-layer", seed), 40.5 - 2 * noise)
        _store(study, _point(study, "stsb", "prefix", seed), 46.0 + noise)
        _store(study, _point(study, "stsb", "prompt", seed), 44.0 + noise)
    text, failed = study.results.verdict()
    assert failed
    assert text.splitlines()[-1] == "not clearly above the floor: prompt, top-layer"
    (line,) = (line for line in text.splitlines() if line.startswith("| lora |"))
    # Differences 30, 29.5 and 30.5: half a point of deviation, times 4.303 / sqrt(3).
    assert "+30.00 [+28.76, +31.24]" in line


def test_a_decoder_is_held_to_the_model_as_it_is_loaded(study) -> None:
    _store(study, _point(study, "e2e_nlg", "untrained"), 2.0, metric="loss")
    _store(study, _point(study, "e2e_nlg", "lora"), 1.5, metric="loss")
    text, failed = study.results.verdict()
    assert not failed
    assert "| 1.500 | 75 % |" in text
    _store(study, _point(study, "e2e_nlg", "full"), 1.95, metric="loss")
    assert study.results.verdict()[0].splitlines()[-1] == "not clearly above the floor: full"
