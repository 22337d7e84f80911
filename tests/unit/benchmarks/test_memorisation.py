"""The study of benchmarks/memorisation: points, the choice of rates, digits as tokens, the curve, the tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rankbits.recipes.load import load
from rankbits.recipes.run import run

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "memorisation"


@pytest.fixture
def study(modules_of, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The study's modules with results in a temporary folder."""
    load = modules_of("memorisation")
    monkeypatch.setattr(load("points"), "RESULTS", tmp_path)
    return SimpleNamespace(load=load, results=tmp_path)


def store(study, name: str, values: list[float]) -> None:
    """A record like the stored one of the base, with another curve."""
    stored = json.loads((FOLDER / "results" / "base.json").read_text(encoding="utf-8"))
    entries = [{"loss": 1.0, "step": 10.0 * (i + 1), "character_accuracy": value} for i, value in enumerate(values)]
    (study.results / f"{name}.json").write_text(json.dumps({**stored, "history": entries}), encoding="utf-8")


def test_every_point_has_one_name_and_choices_come_before_what_they_are_for(study) -> None:
    points = study.load("points")
    names = [point.name for point in points.POINTS]
    assert len(set(names)) == len(names)
    assert len(names) == 1 + 3 * len(points.RATES) + len(points.CHECKS) + 3 * len(points.SEEDS)
    assert names[0] == "base"
    first = next(i for i, point in enumerate(points.POINTS) if point.method)
    assert all(point.method for point in points.POINTS[first:])


def test_all_methods_have_the_same_grid_on_pairs_that_are_not_in_the_table(study) -> None:
    points = study.load("points")
    grids = [tuple(points.choices(method)) for method in points.METHODS]
    assert set(grids) == {points.RATES}
    for method in points.METHODS:
        for rate, point in points.choices(method).items():
            recipe = load(str(FOLDER / "recipe.yaml"), point.changes)
            assert (recipe.method, recipe.training.learning_rate) == (method, float(rate))
            assert recipe.task.evaluate_on == "development"
            assert recipe.training.seed not in points.SEEDS


def test_the_checks_change_nothing_but_the_scale_of_lora(study) -> None:
    points = study.load("points")
    chosen = {point.changes for point in points.choices("lora").values()}
    assert all(point.changes[:-1] in chosen for point in points.CHECKS)
    assert {point.changes[-1] for point in points.CHECKS} == {"adapter.alpha=8", "adapter.alpha=32"}


def test_the_rate_is_the_best_over_all_steps_once_all_were_run(study) -> None:
    points = study.load("points")
    first, second, *others, last = (point.name for point in points.choices("lora").values())
    point = next(point for point in points.POINTS if point.name == "lora-seed1")
    store(study, first, [10.0, 100.0])
    store(study, second, [60.0, 100.0])
    for other in others:
        store(study, other, [0.0, 0.0])
    assert points.chosen_rate("lora") is None
    assert points.changes_of(point) is None
    store(study, last, [70.0, 80.0])
    assert points.chosen_rate("lora") == points.RATES[1]
    assert points.changes_of(point) == ("method=lora", "training.seed=1", f"training.learning_rate={points.RATES[1]}")
    assert points.changes_of(points.POINTS[0]) == points.BASE


def test_lora_and_mora_train_as_many_parameters(study) -> None:
    """Of each layer of the decoder, to what MoRA's whole and even sides allow."""
    decoder = study.load("small_decoder")
    width, inner = decoder.WIDTH, decoder.FEED_FORWARD
    for inputs, outputs in ((width, width), (width, inner), (inner, width)):
        lora = 8 * (inputs + outputs)
        side = 2 * (int(lora**0.5 + 0.5) // 2)
        assert abs(side**2 - lora) / lora < 0.06


def test_two_digits_are_one_token_and_come_back_as_they_were(study) -> None:
    tokenizer = study.load("small_decoder").digit_tokenizer()
    text = f"{bytes(range(16)).hex()}:{bytes(range(240, 256)).hex()}"
    ids = tokenizer(text)["input_ids"]
    assert ids == [*range(16), 256, *range(240, 256)]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (257, 258)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_curve_is_measured_where_the_trainer_logs_and_ends_at_the_score(study, tmp_path: Path) -> None:
    study.load("small_decoder").save_untrained(tmp_path / "untrained", 0)
    changes = [f"model={tmp_path / 'untrained'}", "method=full", "task.train_rows=2", "training.max_steps=16"]
    changes += ["training.batch_size=2", "training.learning_rate=1e-2", "training.logging_steps=8"]
    recipe = load(str(FOLDER / "recipe.yaml"), [*changes, f"output={tmp_path / 'run'}"])
    record = run(recipe, command="test", callbacks=[study.load("recall_curve").RecallCurve(recipe)])
    curve = study.load("points").curve(record)
    assert list(curve) == [8, 16]
    assert curve[8] < curve[16] == record.primary_score().value


def test_a_stored_result_is_not_repeated(study, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = study.load("run")
    made = []
    monkeypatch.setattr(driver, "measured", lambda point, changes: made.append(point.name))
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "lora-choice"])
    names = [point.name for point in study.load("points").choices("lora").values()]
    store(study, names[0], [1.0])
    assert driver.main() == 0
    assert made == names[1:]


def test_what_waits_for_a_choice_is_said(study, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    driver = study.load("run")
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "lora-seed1"])
    assert driver.main() == 1
    assert "lora-seed1: waits for the choice of its learning rate" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["run.py", "--list", "--only", "lora-*"])
    assert driver.main() == 0
    assert "lora-choice-lr2e-3: open" in capsys.readouterr().out


def test_the_table_shows_means_over_seeds_and_differences_on_the_same_pairs(study) -> None:
    points, tables = study.load("points"), study.load("tables")
    assert tables.report() == ""
    for method, values in (("lora", (10.0, 20.0, 30.0)), ("mora", (40.0, 60.0, 80.0))):
        for number, point in enumerate(points.choices(method).values()):
            store(study, point.name, [values[0] + number, 100.0])
        for seed, value in zip(points.SEEDS, values, strict=True):
            store(study, f"{method}-seed{seed}", [value, 100.0])
    report = tables.report()
    published = "9.9 / 10 / 10.7 / 54.2"
    assert f"| 394,624 | {points.RATES[-1]} | 20.0 ± 10.0 | 100.0 ± 0.0 | {published} |" in report
    assert "| 1 | +30.0 | +0.0 |" in report
    assert f"| mora-choice-lr{points.RATES[-1]} | 71.5 | 43.0 | 100.0 | chosen |" in report
    assert "full fine-tuning" not in report
