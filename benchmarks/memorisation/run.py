"""Does MoRA memorise UUID pairs in fewer steps than LoRA of as many parameters? Runs the study, prints its table."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from points import BASE_SEED, POINTS, RESULTS, Point, changes_of, result

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "benchmarks/memorisation/recipe.yaml"
RUNS = Path("runs/memorisation")


def measured(point: Point, changes: tuple[str, ...]) -> None:
    """Train one point in the repository's root, resuming where it stopped, and store its record."""
    from recall_curve import RecallCurve
    from small_decoder import save_untrained

    from rankbits.recipes.load import load
    from rankbits.recipes.run import run

    changes = (*changes, f"output={RUNS / point.name}")
    with contextlib.chdir(ROOT):
        if not (RUNS / "untrained").is_dir():
            save_untrained(RUNS / "untrained", BASE_SEED)
        recipe = load(RECIPE, changes)
        command = shlex.join(["rankbits", "train", RECIPE, *changes])
        record = run(recipe, command=command, callbacks=[RecallCurve(recipe)], announce=_announcer(point.name))
    RESULTS.mkdir(exist_ok=True)
    record.write(RESULTS / f"{point.name}.json")


def _announcer(name: str) -> Any:
    return lambda text: print(f"{name}: {text}", flush=True)


def state(point: Point) -> str:
    """How far a point is, in a word."""
    if result(point.name) is not None:
        return "done"
    return "open" if changes_of(point) is not None else "waits for the choice of its learning rate"


def main() -> int:
    """Run what is missing in order, list the points, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="only points whose name matches")
    parser.add_argument("--list", action="store_true", help="show the points and how far they are")
    parser.add_argument("--table", action="store_true", help="show the table of what is in results/")
    options = parser.parse_args()
    if options.table:
        from tables import report

        print(report())
        return 0
    for point in [point for point in POINTS if fnmatch(point.name, f"*{options.only}*")]:
        if options.list:
            print(f"{point.name}: {state(point)}")
        elif result(point.name) is None:
            changes = changes_of(point)
            if changes is None:
                print(f"{point.name}: {state(point)}", file=sys.stderr)
                return 1
            measured(point, changes)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
