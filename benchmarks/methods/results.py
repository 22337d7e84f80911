"""What is finished: scores, and whether every method left its floor."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from points import DECODER, ENCODER, FLOORS, METHODS, POINTS, SEEDS, UNTRAINED, Point
from scipy.stats import t as student

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    "method",
    "trained, encoder",
    "of it head",
    "rate",
    "Pearson, STS-B",
    "above its floor (95 %)",
    "min",
    "SmolLM2, nats",
    "of untrained",
)
CLEARLY_LOWER = 0.95
"""A decoder's method has learned if its loss is at most that share of the untrained model's."""


def path_of(point: Point) -> Path:
    """The file of a result."""
    return RESULTS / f"{point.name}.json"


def verdict() -> tuple[str, bool]:
    """The table of what is finished, and whether a method with all its results did not clearly leave its floor."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    stuck = []
    for method in (*FLOORS, *METHODS):
        cells, learned = _row(method)
        lines.append(f"| {method} | {' | '.join(cells)} |")
        if not learned:
            stuck.append(method)
    said = f"not clearly above the floor: {', '.join(stuck)}" if stuck else "every finished method left its floor"
    return "\n".join([*lines, "", said]), bool(stuck)


def _row(method: str) -> tuple[list[str], bool]:
    encoder, above = _encoder(method)
    decoder, below = _decoder(method)
    return [*encoder, *decoder], above and below


def _encoder(method: str) -> tuple[list[str], bool]:
    found = _finished(ENCODER, method)
    if not found:
        return ["–"] * 6, True
    scores = {seed: _score(result) for seed, result in found.items()}
    cells = [_spread(list(scores.values()))]
    if method == UNTRAINED:
        return ["0", "0", "–", *cells, "–", "–"], True
    floors = _finished(ENCODER, Point(ENCODER, method, SEEDS[0]).floor)
    margins = [scores[seed] - _score(floors[seed]) for seed in scores if seed in floors]
    first = next(iter(found.values()))
    parameters, minutes = first["parameters"], statistics.fmean(r["training"]["seconds"] / 60 for r in found.values())
    rate = first["recipe"]["training"]["learning_rate"]
    low, text = _interval(margins)
    known = [f"{parameters['trainable']:,}", f"{parameters['head']:,}", f"{rate:g}"]
    return [*known, *cells, text, f"{minutes:.1f}"], low is None or low > 0


def _decoder(method: str) -> tuple[list[str], bool]:
    found, floor = _finished(DECODER, method), _finished(DECODER, UNTRAINED)
    if not found or not floor:
        return ["–", "–"], True
    loss, untrained = (_loss(next(iter(results.values()))) for results in (found, floor))
    return [f"{loss:.3f}", f"{100 * loss / untrained:.0f} %"], method == UNTRAINED or loss <= CLEARLY_LOWER * untrained


def _finished(task: str, method: str) -> dict[int, dict[str, Any]]:
    points = (p for p in POINTS if p.task == task and p.method == method)
    return {point.seed: _result(point) for point in points if path_of(point).is_file()}


def _result(point: Point) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path_of(point).read_text(encoding="utf-8"))
    return result


def _score(result: dict[str, Any]) -> float:
    return float(next(entry["value"] for entry in result["scores"] if entry["primary"]))


def _loss(result: dict[str, Any]) -> float:
    return float(next(entry["value"] for entry in result["scores"] if entry["metric"] == "loss"))


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _interval(margins: list[float]) -> tuple[float | None, str]:
    """Lower end of the mean's 95 % interval by Student's t, None before all seeds are there, and it in words."""
    if not margins:
        return None, "–"
    mean = statistics.fmean(margins)
    if len(margins) < len(SEEDS):
        return None, f"{mean:+.2f}"
    half = float(student.ppf(0.975, len(margins) - 1)) * statistics.stdev(margins) / math.sqrt(len(margins))
    return mean - half, f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
