"""Do LoRA and DoRA change magnitude and direction as full fine-tuning does? Runs what is missing, prints, draws."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rankbits import tasks
from rankbits.recipes import models
from rankbits.recipes.load import load
from rankbits.recipes.run import run
from rankbits.records import RunRecord, WeightChangeRecord, write_atomically
from rankbits.reports.figures import magnitude_by_direction, write_figures
from rankbits.training.weight_change_callback import WeightChangeCallback

HERE = Path(__file__).parent
RESULTS, FIGURES = HERE / "results", HERE / "figures"
RECIPE = "glue/minilm/stsb"
KINDS = ("query", "value")
WORK = (
    "task.train_rows=2400",
    "task.evaluate_on=development",
    "training.batch_size=16",
    "training.epochs=2",
    "training.save_steps=60",
    "training.warmup_ratio=0.1",
    "training.group_by_length=true",
)
ADAPTER = ("adapter.r=8", "adapter.alpha=16", "adapter.targets=[query,value]")
RATES = {"full": ("5e-5", "1e-4"), "lora": ("5e-4", "1e-3"), "dora": ("5e-4", "1e-3")}
"""Two for each method; the one with the best score at the first seed is taken for all seeds."""
SEEDS = (42, 43, 44)
Result = dict[str, Any]


def changes_of(method: str, rate: str, seed: int) -> list[str]:
    """What a run changes in the recipe."""
    adapter = () if method == "full" else ADAPTER
    return [f"method={method}", *WORK, *adapter, f"training.learning_rate={rate}", f"training.seed={seed}"]


def measured(method: str, rate: str, seed: int) -> Result:
    """The stored result of one run, made first if it is not there; needs $RANKBITS_DATA/stsb."""
    path = RESULTS / f"{method}-lr{rate}-seed{seed}.json"
    if path.is_file():
        stored: Result = json.loads(path.read_text(encoding="utf-8"))
        return stored
    with tempfile.TemporaryDirectory() as folder:
        changes = changes_of(method, rate, seed)
        recipe = load(RECIPE, [*changes, f"output={folder}/run"])
        callback = WeightChangeCallback(models.load_model(recipe.model, tasks.get(recipe.task.name)), method, KINDS)
        command = shlex.join(["rankbits", "train", RECIPE, *changes])
        record = run(recipe, command=command, callbacks=[callback], announce=lambda text: print(path.stem, text))
    result = result_of(record, callback.points)
    RESULTS.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def result_of(record: RunRecord, points: list[WeightChangeRecord]) -> Result:
    """What is stored of a run: how it was made, what it scored, what was measured at its checkpoints."""
    kept = {"method", "seed", "command", "recipe_hash", "created", "versions", "machine", "recipe", "data", "training"}
    return {
        **record.model_dump(mode="json", include=kept),
        "score": record.primary_score().model_dump(mode="json"),
        "correlations": {kind: correlation(points, kind) for kind in KINDS},
        "points": [point.model_dump(mode="json") for point in points],
    }


def points_of(result: Result) -> list[WeightChangeRecord]:
    """What was measured at the checkpoints of a run."""
    return [WeightChangeRecord(**point) for point in result["points"]]


def correlation(points: Iterable[WeightChangeRecord], kind: str) -> float:
    """Pearson's correlation of the changes of magnitude and direction over all matrices of a kind and checkpoints."""
    pairs = [(point.direction, point.magnitude) for point in points if point.kind == kind]
    return statistics.correlation(*zip(*pairs, strict=True))


def at_the_end(points: list[WeightChangeRecord]) -> list[WeightChangeRecord]:
    """Those of the last checkpoint."""
    last = max(point.step for point in points)
    return [point for point in points if point.step == last]


def chosen_rate(method: str) -> str:
    """The learning rate with the best score at the first seed."""
    return max(RATES[method], key=lambda rate: float(measured(method, rate, SEEDS[0])["score"]["value"]))


def row(method: str, rate: str, results: list[Result]) -> str:
    """One line of the table: mean and sample standard deviation over seeds."""
    points = [points_of(result) for result in results]
    cells = [spread([result["score"]["value"] for result in results])]
    cells += [spread([result["correlations"][kind] for result in results]) for kind in KINDS]
    cells += [spread([correlation(at_the_end(held), kind) for held in points]) for kind in KINDS]
    for quantity in ("magnitude", "direction"):
        ends = [statistics.fmean(getattr(point, quantity) for point in at_the_end(held)) for held in points]
        cells.append(spread(ends, ".2g"))
    return f"| {method} | {rate} | {' | '.join(cells)} |"


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean ± sample standard deviation, or the one number."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def main() -> int:
    """Run what is missing, print the table, draw the figure of the first seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    seeds = parser.parse_args().seeds
    rates = {method: chosen_rate(method) for method in RATES}
    by_seed = [{method: measured(method, rate, seed) for method, rate in rates.items()} for seed in seeds]
    print("| method | rate | Pearson | query, all | value, all | query, last | value, last | mean ΔM | mean ΔD |")
    print("|---|---|---|---|---|---|---|---|---|")
    for method, rate in rates.items():
        print(row(method, rate, [results[method] for results in by_seed]))
    first = [point for result in by_seed[0].values() for point in points_of(result)]
    write_figures([magnitude_by_direction(first)], FIGURES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
