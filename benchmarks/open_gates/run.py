"""Does Bayesian-LoRA with every gate open learn as LoRA does? STS-B with MiniLM, two epochs, both methods."""

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
WORK = ["training.epochs=2", "training.learning_rate=1e-3", "training.batch_size=32", "adapter.alpha=16", "adapter.r=8"]
OPEN = ["gates.lambda_q=0", "gates.lambda_r=0", "gates.fixed=0"]
METHODS = {"lora": ["method=lora"], "bayesian-lora-open": ["method=bayesian-lora", *OPEN]}


def measured(name: str, seed: int) -> RunRecord:
    """The stored record of one run, made first if it is not there; needs $RANKBITS_DATA/stsb."""
    path = RESULTS / f"{name}-seed{seed}.json"
    if path.is_file():
        return RunRecord.read(path)
    changes = [*WORK, *METHODS[name], f"training.seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        recipe = load("glue/minilm/stsb", [*changes, f"output={folder}/run"])
        command = shlex.join(["rankbits", "train", "glue/minilm/stsb", *changes])
        record = run(recipe, command=command, announce=lambda text: print(f"{name} seed {seed}: {text}", flush=True))
    RESULTS.mkdir(exist_ok=True)
    record.write(path)
    return record


def main() -> int:
    """Run what is missing, print Pearson's correlation of each, and fail beyond half a point of difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    seeds = parser.parse_args().seeds
    means = {}
    for name in METHODS:
        records = [measured(name, seed) for seed in seeds]
        scores = [record.primary_score().value for record in records]
        means[name] = statistics.mean(scores)
        bits = {record.mean_adapter_bits() for record in records}
        print(f"{name}: Pearson {', '.join(f'{s:.2f}' for s in scores)}; mean {means[name]:.2f}; adapter bits {bits}")
    difference = means["bayesian-lora-open"] - means["lora"]
    print(f"difference {difference:+.2f}")
    return 0 if difference >= -0.5 else 1


if __name__ == "__main__":
    sys.exit(main())
