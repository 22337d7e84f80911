"""How much longer does a training step take than LoRA's? Measures each case in a process of its own, prints tables."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""As in the accuracy study. With large pages the kernel spends no time on pages of activations, on either side."""
LIMITS = {
    **{("qkv", moment): 1.20 for moment in ("run", "sampled")},
    **{("all", moment): 1.30 for moment in ("run", "sampled")},
    **{(modules, "fixed"): 1.10 for modules in ("qkv", "all")},
}
"""Largest ratio, by modules and phase; `run` is a whole run of the recipe."""
SHARES = {
    "q-ra": {"standing": 0.1, "measuring": 0.1, "fixed": 0.8},
    **{name: {"standing": 0.35, "measuring": 0.35, "fixed": 0.3} for name in ("affine16", "affine")},
}
"""Of the steps of the recipes, whose warm-up is 0.2 and 0.7; the evidence is measured in its second half."""
MEMORY_LIMIT, KERNEL_FACTOR = 1.3, 12.0
KERNEL_SHAPES = ("2048 x 384", "2048 x 1536")
RANKS, BLOCKS, BATCHES = (2, 8, 32, 64), (1, 2, 4, 6), (4, 8, 16, 32)


@dataclass(frozen=True)
class Case:
    """One process.

    Args:
        what: "steps", "peak" or "quantizers".
        label: name of its file of results.
        arguments: of measure.py.
    """

    what: str
    label: str
    arguments: tuple[str, ...] = ()


def _case(what: str, label: str, *, modules: str = "all", variant: str = "q-ra", **more: Any) -> Case:
    rounds, changes = more.get("rounds", 11), more.get("changes", ())
    shape = {"batch": more.get("batch", 32), "length": more.get("length", 128)}
    settings = [f"--{k}={v}" for k, v in {"modules": modules, "variant": variant, **shape}.items()]
    return Case(what, label, (*settings, f"--rounds={rounds}", *(f"--set={change}" for change in changes)))


def _blocks(count: int) -> tuple[str, ...]:
    return (rf"adapter.targets=.*encoder\.layer\.[0-{count - 1}]\..*(query|key|value|dense)",)


STEPS = [
    _case("steps", f"steps-{m}-{v}-{n}", modules=m, variant=v, length=n)
    for v, lengths in {
        "affine16": (128, 64),
        "affine": (128,),
        "q-ra": (128, 64),
        "descent": (128,),
        "ra": (128,),
    }.items()
    for m in ("qkv", "all")
    for n in lengths
]
PEAKS = [
    _case("peak", f"peak-{m}-{v}", modules=m, variant=v, rounds=3) for m in ("qkv", "all") for v in ("lora", *SHARES)
]
GROWTH = [
    *[_case("steps", f"growth-rank{r}", rounds=9, changes=(f"adapter.r={r}",)) for r in RANKS],
    *[_case("steps", f"growth-blocks{n}", rounds=9, changes=_blocks(n)) for n in BLOCKS],
    *[_case("steps", f"growth-batch{b}", rounds=9, batch=b) for b in BATCHES],
]
QUANTIZERS = [Case("quantizers", "quantizers", ("--rounds=51",))]
CASES = [*STEPS, *PEAKS, *QUANTIZERS, *GROWTH]


def measured(case: Case, extra: tuple[str, ...] = (), *, trial: bool = False) -> dict[str, Any]:
    """The stored result of a case, measured first if it is not there; a trial neither reads nor writes one."""
    path = RESULTS / f"{case.label}.json"
    if path.is_file() and not trial:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return stored
    changes = [f"--set={change}" for change in extra] if case.what != "quantizers" else []
    arguments = [case.what, *case.arguments, *changes]
    command = [sys.executable, str(HERE / "measure.py"), *arguments]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case.label} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    command_text = shlex.join(["benchmarks/training_speed/measure.py", *arguments])
    result = {"case": case.label, "command": command_text, "environment": ENVIRONMENT, **found}
    if not trial:
        RESULTS.mkdir(exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(result, indent=1) + "\n")
    return result


def compared(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """(Ratio of the medians, lower and upper quartile of the ratios of single rounds)."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ours) / statistics.median(theirs), low, high


def whole_run(seconds: dict[str, dict[str, list[float]]], shares: dict[str, float]) -> dict[str, list[float]]:
    """Seconds of a mean step of a whole run on each side, in each round."""
    sides = next(iter(seconds.values()))
    return {
        side: [
            sum(share * taken for share, taken in zip(shares.values(), moments, strict=True))
            for moments in zip(*(seconds[moment][side] for moment in shares), strict=True)
        ]
        for side in sides
    }


def step_rows(case: Case, result: dict[str, Any], missed: list[str]) -> None:
    """Print the lines of one pair of sides; a ratio above its limit goes to `missed`."""
    seconds = result["seconds"]
    (ours,) = [name for name in next(iter(seconds.values())) if name != "lora"]
    if ours in SHARES:
        seconds = {**seconds, "run": whole_run(seconds, SHARES[ours])}
    for moment, taken in seconds.items():
        ratio, low, high = compared(taken[ours], taken["lora"])
        is_limited = case in STEPS and ours != "ra"
        limit = LIMITS.get(("qkv" if "qkv" in case.label else "all", moment)) if is_limited else None
        medians = [f"{statistics.median(taken[name]):.3f}" for name in ("lora", ours)]
        cells = [case.label, moment, *medians, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", f"{limit or '–'}"]
        print("| " + " | ".join(cells) + " |", flush=True)
        if limit is not None and ratio > limit:
            missed.append(f"{case.label} {moment}: {ratio:.3f}, at most {limit} was promised")


def kernel_rows(result: dict[str, Any], missed: list[str]) -> None:
    """Print the table of quantizers."""
    print("\n| tensor | reference ms | fused ms | times faster | forward / copy | one width, forward / copy |")
    print("|---|---|---|---|---|---|")
    for shape, taken in result["seconds"].items():
        median = {name: statistics.median(values) for name, values in taken.items()}
        factor = median["reference"] / median["fused"]
        forward, hard = (median[name] / median["copy"] for name in ("fused, forward", "one width, forward"))
        times = f"{1e3 * median['reference']:.2f} | {1e3 * median['fused']:.2f} | {factor:.1f}"
        print(f"| {shape} | {times} | {forward:.1f} | {hard:.1f} |", flush=True)
        if shape in KERNEL_SHAPES and factor < KERNEL_FACTOR:
            missed.append(f"quantizer on {shape}: {factor:.1f} times faster, at least {KERNEL_FACTOR} were promised")


def peak_rows(results: dict[str, dict[str, Any]], missed: list[str]) -> None:
    """Print the table of peaks."""
    print("\n| modules | ours | LoRA MiB | ours MiB | ratio |\n|---|---|---|---|---|")
    for modules in ("qkv", "all"):
        for variant in SHARES:
            names = [f"peak-{modules}-{side}" for side in ("lora", variant)]
            if all(name in results for name in names):
                lora, ours = (results[name]["peak_bytes"] / 2**20 for name in names)
                print(f"| {modules} | {variant} | {lora:.0f} | {ours:.0f} | {ours / lora:.3f} |")
                if ours / lora > MEMORY_LIMIT:
                    told = f"peak memory, {modules}, {variant}: {ours / lora:.3f}"
                    missed.append(f"{told}, at most {MEMORY_LIMIT} was promised")


def main() -> int:
    """Measure what is missing, print the tables, and fail if a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--trial", action="store_true", help="measure anew and store nothing")
    parser.add_argument("--set", action="append", default=[], help="key=value for both sides, in trials")
    given = parser.parse_args()
    if given.set and not given.trial:
        parser.error("--set is for trials: stored results are those of the recipe")
    chosen = [case for case in CASES if given.only in case.label]
    results: dict[str, dict[str, Any]] = {}
    missed: list[str] = []
    if any(case.what == "steps" for case in chosen):
        print("| case | phase | LoRA s | ours s | ratio | quartiles | limit |\n|---|---|---|---|---|---|---|")
    for case in sorted(chosen, key=lambda case: case.what != "steps"):
        results[case.label] = measured(case, tuple(given.set), trial=given.trial)
        if case.what == "steps":
            step_rows(case, results[case.label], missed)
        if case.what == "quantizers":
            kernel_rows(results[case.label], missed)
    peak_rows(results, missed)
    print("\n".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
