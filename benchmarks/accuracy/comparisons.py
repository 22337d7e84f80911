"""What the tables are made of: outcomes paired by seed, their differences, and how cells are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from outcomes import Outcome, Sample, interval, outcome, spread
from points import BUDGETS, CLAIMED, MAIN_TASKS, NARROW, ONE_SEED_TASKS, SEEDS, Make, Point

NONE = "–"
ALLOWED_LOSS = {0.25: 0.3, 0.125: 0.7}
ALLOWED_BYTES = {NARROW: 0.15}
REFERENCE_RATIO = 4
"""A share of 16-bit bit operations is four times that of 32-bit ones."""
TASKS = (*MAIN_TASKS, *ONE_SEED_TASKS)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines] if lines else ["Nothing there yet."]


def score(point: Point) -> str:
    """Of one finished point."""
    found = outcome(point.name)
    return NONE if found is None else f"{found.score:.2f}"


def percent(values: Iterable[float]) -> str:
    """The mean of shares."""
    listed = list(values)
    return f"{100 * sum(listed) / len(listed):.2f}" if listed else NONE


def share(budget: float) -> str:
    """A budget in percent of 32-bit bit operations."""
    return f"{100 * budget / REFERENCE_RATIO:.2f}"


def pairs(task: str, ours: Make, theirs: Make) -> list[tuple[Outcome, Outcome]]:
    """Outcomes of both methods for the seeds that both have."""
    found = ((outcome(ours(task, seed).name), outcome(theirs(task, seed).name)) for seed in SEEDS)
    return [(mine, other) for mine, other in found if mine is not None and other is not None]


def differences(task: str, ours: Make, theirs: Make) -> Sample | None:
    """Score of ours minus theirs, seed by seed; None without a common seed."""
    values = [mine.score - other.score for mine, other in pairs(task, ours, theirs)]
    return Sample(values) if values else None


def spreads(outcomes: Sequence[Outcome], field: str) -> str:
    """Mean and standard deviation of one of their numbers."""
    return spread(Sample([getattr(one, field) for one in outcomes]))


def learned_means(outcomes: Sequence[Outcome]) -> list[str]:
    """Mean widths of weights and inputs, and mean rank."""

    def mean(values: Iterable[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{Sample(known).mean:.2f}" if known else NONE

    return [mean(o.weight_bits for o in outcomes), mean(o.input_bits for o in outcomes), mean(o.rank for o in outcomes)]


def claims(make: Make, lora: Make, budget: float) -> tuple[list[list[str]], list[float]]:
    """At one budget, task by task: both scores, their difference and costs as cells; and the mean differences."""
    rows, means = [], []
    for task in TASKS:
        difference = differences(task, make, lora)
        if difference is None:
            continue
        mine, theirs = zip(*pairs(task, make, lora), strict=True)
        means.append(difference.mean)
        scores, losses = ([spreads(side, field) for side in (theirs, mine)] for field in ("score", "loss"))
        costs = [percent(getattr(o, field) for o in mine) for field in ("bops", "weight_bytes", "whole")]
        rows.append([share(budget), task, *scores, interval(difference), *losses, *costs, *learned_means(mine)])
    return rows, means


def claim_table(at: dict[float, Make], lora: Make) -> list[str]:
    """The tables of all budgets, then the verdict on those for which something is claimed."""
    head = ["% of 32-bit", "task", "LoRA", "q + ra", "difference", "LoRA's training loss", "q + ra's"]
    head += ["bops %", "bytes %", "whole bops %", "W bits", "x bits", "rank"]
    rows: list[list[str]] = []
    verdicts = []
    for budget in BUDGETS:
        if budget in at:
            found, means = claims(at[budget], lora, budget)
            rows += found
            if means and budget in CLAIMED:
                verdicts.append(_verdict(budget, means, at[budget]))
    return [*table(head, rows), "", *verdicts]


def _verdict(budget: float, means: Sequence[float], make: Make) -> str:
    mean, allowed = Sample(means).mean, ALLOWED_LOSS[budget]
    sizes = [o.weight_bytes for t in TASKS for s in SEEDS if (o := outcome(make(t, s).name))]
    met = mean >= -allowed and max(sizes) <= ALLOWED_BYTES.get(budget, 1.0)
    word = ("met" if met else "not met") if len(means) == len(TASKS) else f"{len(means)} of {len(TASKS)} tasks so far"
    of_bytes = f", most bytes of a run {percent([max(sizes)])} %"
    return f"- {share(budget)} %: mean over tasks {mean:+.2f} points, allowed {-allowed:+.1f}{of_bytes}: {word}."


def against(task: str, label: str, ours: Make, theirs: Make) -> list[str] | None:
    """Learned gates beside others of the same cost, or None without a common seed."""
    difference = differences(task, ours, theirs)
    if difference is None:
        return None
    sides = [list(side) for side in zip(*pairs(task, ours, theirs), strict=True)]
    scores, losses = ([spreads(side, field) for side in sides] for field in ("score", "loss"))
    bops = [percent(o.bops for o in side) for side in sides]
    return [task, label, *scores, interval(difference), *losses, *bops]


AGAINST = ["task", "against", "learned", "other", "difference"]
AGAINST += [f"{side} {what}" for what in ("training loss", "bops %") for side in ("learned", "other")]
