"""Is Bayesian-LoRA as good as LoRA at a fraction of the bits? Runs the study, prints its tables."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import earlier
from points import POINTS, Point
from scratch import claimed, is_running, log_file, result_file

from rankbits.tasks.loading import DATA_VARIABLE

BUSY, FAILED = 75, 1
WAIT_SECONDS = 20
HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Activations are freed and allocated anew in every step; with large pages the kernel spends no time on it."""


def chosen(points: Sequence[Point], pattern: str) -> list[Point]:
    """The points whose name matches: `*` and `?` as in file names, at either end too."""
    return [point for point in points if fnmatch(point.name, f"*{pattern}*")]


def is_done(name: str) -> bool:
    """Whether a point has its result."""
    return result_file(name).is_file()


def may_start(point: Point) -> bool:
    """Whether a point lacks its result and has what it is made from."""
    return not is_done(point.name) and (point.source is None or is_done(point.source))


def lacking(points: Sequence[Point]) -> str | None:
    """What is wrong with where the data of unfinished points should be; None if it is there."""
    tasks = sorted({point.task for point in points if not is_done(point.name)})
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        return f"{DATA_VARIABLE} is not set; it should name a folder that holds {', '.join(tasks)}" if tasks else None
    missing = [task for task in tasks if not (Path(folder) / task).is_dir()]
    return f"{DATA_VARIABLE}={folder} holds no {', no '.join(missing)}" if missing else None


def start(point: Point, threads: int) -> int:
    """Work out one point in a process of its own, so that memory and threads are its own; its exit status.

    A process that finds the point taken by another ends at once with `BUSY`.
    """
    log = log_file(point.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"HF_HUB_OFFLINE": "1", "GLIBC_TUNABLES": HUGE_PAGES, **os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).resolve()), "--point", point.name, "--threads", str(threads)]
    with log.open("a", encoding="utf-8") as file:
        return subprocess.run(command, env=environment, stdout=file, stderr=file, check=False).returncode


def work_through(points: Sequence[Point], threads: int) -> list[str]:
    """Run what is missing in the order of the list; names of the points that failed.

    After every point the list is looked at from its beginning, because a point may have become possible. Where all that
    is left is in other hands, it waits for them.
    """
    failed: list[str] = []
    while True:
        busy = False
        for point in points:
            if point.name in failed or not may_start(point):
                continue
            began = time.monotonic()
            status = start(point, threads)
            if status == BUSY:
                busy = True
                continue
            if status:
                failed.append(point.name)
            word = f"failed with status {status}, see" if status else "done, log in"
            minutes = (time.monotonic() - began) / 60
            print(f"{point.name}: {word} {log_file(point.name)} ({minutes:.1f} min)", flush=True)
            break
        else:
            if not busy:
                return failed
            time.sleep(WAIT_SECONDS)


def run_point(name: str, threads: int) -> int:
    """Work out one point here, if no other process is at it."""
    point = next(point for point in (*POINTS, *earlier.POINTS) if point.name == name)
    with claimed(name) as mine:
        if not mine:
            return BUSY
        if is_done(name):
            return 0
        import torch

        torch.set_num_threads(threads)
        from work import result_of

        result_of(point)
    return 0


def listed(points: Sequence[Point]) -> str:
    """One line a point: its name and how far it is."""

    def state(point: Point) -> str:
        if is_done(point.name):
            return "done"
        if is_running(point.name):
            return "running"
        return "open" if may_start(point) else f"waits for {point.source}"

    lines = [f"{state(point):10} {point.name}" for point in points]
    return "\n".join([*lines, f"{sum(is_done(point.name) for point in points)} of {len(points)} done"])


def main() -> int:
    """Run, list or tabulate; 1 if a point failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="only points whose name matches")
    parser.add_argument("--list", action="store_true", help="show the points and how far they are")
    parser.add_argument("--table", action="store_true", help="show the tables of what is in results/")
    parser.add_argument("--picture", action="store_true", help="draw score-by-budget.svg of what is in results/")
    parser.add_argument("--earlier", action="store_true", help="points of the recipes before instead of the study's")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        return run_point(options.point, options.threads)
    if options.table:
        from tables import report

        print(report(of_earlier=options.earlier))
        return 0
    if options.picture:
        from picture import write

        print("\n".join(map(str, write(Path(__file__).parent))))
        return 0
    points = chosen(earlier.POINTS if options.earlier else POINTS, options.only)
    if options.list:
        print(listed(points))
        return 0
    if not points:
        parser.error(f"no point matches {options.only!r}; --list shows their names")
    if complaint := lacking(points):
        parser.error(complaint)
    failed = work_through(points, options.threads)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
