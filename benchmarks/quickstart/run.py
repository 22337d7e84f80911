"""Is Bayesian-LoRA as accurate as LoRA on the quickstart's work? Runs both over several seeds and prints the table."""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

from rankbits.recipes.load import load
from rankbits.recipes.run import run
from rankbits.records import RunRecord

RESULTS = Path(__file__).parent / "results"
METHODS = ("lora", "bayesian-lora")


def measured(method: str, seed: int) -> RunRecord:
    """The stored record of one run, made first if it is not there."""
    path = RESULTS / f"{method}-seed{seed}.json"
    if path.is_file():
        return RunRecord.read(path)
    changes = [f"method={method}", f"training.seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        recipe = load("quickstart", [*changes, f"output={folder}/run"])
        command = shlex.join(["rankbits", "train", "quickstart", *changes])
        record = run(recipe, command=command, announce=lambda text: print(f"{method} seed {seed}: {text}", flush=True))
    RESULTS.mkdir(exist_ok=True)
    record.write(path)
    return record


def row(method: str, records: list[RunRecord]) -> str:
    """One line of the table: mean and sample standard deviation over seeds."""

    def spread(values: list[float]) -> str:
        return (
            f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
        )

    def bits(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        return spread(known) if known else "–"

    cells = [
        method,
        spread([r.primary_score().value for r in records]),
        bits([r.mean_rank() for r in records]),
        bits([r.mean_bits("weight") for r in records]),
        bits([r.mean_adapter_bits() for r in records]),
        spread([r.training.seconds for r in records]),
        f"{max(r.training.peak_memory_bytes for r in records) / 2**30:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Run what is missing, print the table, and fail if the accuracy is more than 1.5 points below LoRA's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    seeds = parser.parse_args().seeds
    records = {method: [measured(method, seed) for seed in seeds] for method in METHODS}
    print("| method | accuracy | mean rank | bits of W0 | bits of A, E, B | seconds | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    for method in METHODS:
        print(row(method, records[method]))
    scores = {m: [r.primary_score().value for r in records[m]] for m in METHODS}
    differences = [ours - lora for ours, lora in zip(scores["bayesian-lora"], scores["lora"], strict=True)]
    by_seed = ", ".join(f"{difference:+.2f}" for difference in differences)
    print(f"paired difference to LoRA: {statistics.mean(differences):+.2f} points (by seed: {by_seed})")
    return 0 if statistics.mean(differences) >= -1.5 else 1


if __name__ == "__main__":
    sys.exit(main())
