"""Tables of what is in results/: character accuracy over steps, and what each learning rate was chosen on."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from points import CHECKS, METHODS, SEEDS, choices, chosen_rate, curve, result

from rankbits.records import RunRecord

NAMES = {"full": "full fine-tuning", "lora": "LoRA, r = 8", "mora": "MoRA, r = 8"}
PUBLISHED = {
    "full": (42.5, 100.0, 100.0, 100.0),
    "lora": (9.9, 10.0, 10.7, 54.2),
    "mora": (10.1, 15.7, 87.4, 100.0),
}
"""Character accuracy at 300, 500, 700 and 900 steps of another model and another schedule (Jiang et al. 2024)."""


def report() -> str:
    """All tables of which every run is there."""
    return "\n\n".join("\n".join(lines) for lines in (accuracies(), differences(), rates()) if len(lines) > 2)


def accuracies() -> list[str]:
    """Mean and sample standard deviation over the seeds, at each step, beside the published order."""
    rows, head = [], []
    for method in METHODS:
        records = seeds_of(method)
        if not records:
            continue
        curves = [curve(record) for record in records]
        head = [f"{step} steps" for step in curves[0]]
        values = [spread([one[step] for one in curves]) for step in curves[0]]
        published = " / ".join(f"{value:g}" for value in PUBLISHED[method])
        trained = f"{records[0].parameters.trainable:,}"
        rows.append([NAMES[method], trained, chosen_rate(method) or "", *values, published])
    return table(["method", "trained", "rate", *head, "published"], rows)


def differences() -> list[str]:
    """MoRA's character accuracy less LoRA's on the same pairs, for every seed and step."""
    lora, mora = ([curve(record) for record in seeds_of(method)] for method in ("lora", "mora"))
    if not lora or not mora:
        return []
    rows = [
        [str(seed), *(f"{theirs[step] - ours[step]:+.1f}" for step in ours)]
        for seed, ours, theirs in zip(SEEDS, lora, mora, strict=True)
    ]
    return table(["MoRA - LoRA, seed", *(f"{step} steps" for step in lora[0])], rows)


def rates() -> list[str]:
    """Character accuracy of the runs that chose each learning rate, and of the checks: averaged, and at each step."""
    rows, head = [], []
    chosen = {choices(method)[rate].name for method in METHODS if (rate := chosen_rate(method)) is not None}
    for point in (*(point for method in METHODS for point in choices(method).values()), *CHECKS):
        record = result(point.name)
        if record is not None:
            values = curve(record)
            head = [f"{step} steps" for step in values]
            mean = statistics.fmean(values.values())
            cells = [f"{value:.1f}" for value in (mean, *values.values())]
            rows.append([point.name, *cells, "chosen" if point.name in chosen else ""])
    return table(["run", "mean", *head, ""], rows)


def seeds_of(method: str) -> list[RunRecord]:
    """The records of all seeds; none while one is missing."""
    found = [record for seed in SEEDS if (record := result(f"{method}-seed{seed}")) is not None]
    return found if len(found) == len(SEEDS) else []


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
