"""The tables of the study, one a question, from what is in results/ and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from outcomes import Outcome, Sample, before_rounding, interval, outcome, rounded, spread
from points import (
    BUDGETS,
    CLAIMED,
    CURVE_TASKS,
    DEFAULT_PLACEMENT,
    EPOCHS,
    FINER,
    FIRST_SEED,
    LONGER,
    MAIN_TASKS,
    MIXED,
    ONE_SEED_TASKS,
    PLACEMENTS,
    POINTS,
    SEEDS,
    TIGHT,
    VARIANTS,
    Point,
    adalora,
    affine,
    finer,
    foreign,
    learned,
    longer,
    lora,
    paper,
    permuted,
    rate_choices,
    uniform,
)
from points import rounded as rounded_point

NONE = "–"
ALLOWED_LOSS = {0.25: 0.3, 0.125: 0.7}
ALLOWED_BYTES = {0.125: 0.15}
SAME_COST = {0.25: "w8a8", 0.125: "w4a8", 0.09375: "w3a8", 0.0625: "w2a8"}
"""Uniform widths whose bit operations equal a budget's."""
UNIFORM = {0.25: (8, 8), 0.125: (4, 8), 0.0625: (2, 8)}
ALSO_UNIFORM = (4, 4)
REFERENCE_RATIO = 4
"""A share of 16-bit bit operations is four times that of 32-bit ones."""


def report() -> str:
    """All tables as Markdown."""
    sections: list[tuple[str, Callable[[], list[str]]]] = [
        ("Learning rates on held-out training rows", rates),
        ("The claim: q + ra against LoRA", claims),
        ("MRPC with more epochs", longer_runs),
        ("Finer grids where budgets are tight", finer_runs),
        ("Score against budget", curve),
        ("LoRA rounded after training", rounding),
        ("What q + ra wins back of that", won_back),
        ("Learned against permuted and uniform widths, at equal cost", allocations),
        ("AdaLoRA", adaptive),
        ("The letter of the paper", letter),
    ]
    texts = [f"### {title}\n\n" + "\n".join(make()) for title, make in sections]
    done = [found for point in POINTS if (found := _trained(point)) is not None]
    hours = sum(found.seconds for found in done) / 3600
    return "\n\n".join([*texts, f"{len(done)} trained points, {hours:.1f} hours of training in all.\n"])


def _trained(point: Point) -> Outcome | None:
    return None if point.kind.value in {"rounded", "foreign"} else outcome(point.name)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines] if lines else ["Nothing there yet."]


def _score(point: Point) -> str:
    found = outcome(point.name)
    return NONE if found is None else f"{found.score:.2f}"


def _percent(values: Iterable[float]) -> str:
    listed = list(values)
    return f"{100 * sum(listed) / len(listed):.2f}" if listed else NONE


def rates() -> list[str]:
    """Score of each learning rate that was tried."""
    rows = [(p.task, p.label, _score(p)) for p in rate_choices() if outcome(p.name) is not None]
    return _table(["task", "run", "score"], rows)


Make = Callable[[str, int], Point]
"""From a task and a seed to a point."""


def pairs(task: str, ours: Make, theirs: Make) -> list[tuple[Outcome, Outcome]]:
    """Outcomes of both methods for the seeds that both have."""
    found = ((outcome(ours(task, seed).name), outcome(theirs(task, seed).name)) for seed in SEEDS)
    return [(mine, other) for mine, other in found if mine is not None and other is not None]


def differences(task: str, ours: Make, theirs: Make) -> Sample | None:
    """Score of ours minus theirs, seed by seed; None without a common seed."""
    values = [mine.score - other.score for mine, other in pairs(task, ours, theirs)]
    return Sample(values) if values else None


def _ours(budget: float, variant: str = "q-ra", placement: str = DEFAULT_PLACEMENT) -> Make:
    return lambda task, seed: learned(task, variant, placement, budget, seed)


def _affine(budget: float) -> Make:
    return lambda task, seed: affine(task, budget, seed)


def claims() -> list[str]:
    """Per budget and task: both scores, their paired difference, costs; then the verdict on what is claimed."""
    head = [
        "grids",
        "budget",
        "task",
        "LoRA",
        "q + ra",
        "difference",
        "bops %",
        "bytes %",
        "whole bops %",
        "W bits",
        "x bits",
        "rank",
    ]
    rows: list[list[str]] = []
    verdicts = []
    for grids, at in (("affine", _affine), ("groups of 64", _ours)):
        for budget in BUDGETS:
            means = []
            for task in (*MAIN_TASKS, *ONE_SEED_TASKS):
                found = pairs(task, at(budget), lora)
                difference = differences(task, at(budget), lora)
                if difference is None:
                    continue
                means.append(difference.mean)
                mine = [one for one, _ in found]
                scores = [spread(Sample([o.score for o in side])) for side in ([other for _, other in found], mine)]
                costs = [_percent(getattr(o, field) for o in mine) for field in ("bops", "weight_bytes", "whole")]
                rows.append([grids, f"bops={budget:g}", task, *scores, interval(difference), *costs, *_learned(mine)])
            if means and budget in CLAIMED:
                verdicts.append(f"- {grids}, {_verdict(budget, means, at(budget))}")
    return [*_table(head, rows), "", *verdicts]


def _learned(outcomes: Sequence[Outcome]) -> list[str]:
    def mean(values: Iterable[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{Sample(known).mean:.2f}" if known else NONE

    return [mean(o.weight_bits for o in outcomes), mean(o.input_bits for o in outcomes), mean(o.rank for o in outcomes)]


def _verdict(budget: float, means: Sequence[float], ours: Make) -> str:
    tasks = len(MAIN_TASKS) + len(ONE_SEED_TASKS)
    mean, allowed = Sample(means).mean, ALLOWED_LOSS[budget]
    sizes = [o.weight_bytes for p in POINTS if p.label == ours("stsb", 0).label and (o := outcome(p.name))]
    met = mean >= -allowed and max(sizes, default=0.0) <= ALLOWED_BYTES.get(budget, 1.0)
    word = ("met" if met else "not met") if len(means) == tasks else f"{len(means)} of {tasks} tasks so far"
    return f"bops={budget:g}: mean over tasks {mean:+.2f} points, allowed {-allowed:+.1f}: {word}."


def _finer(make: Make, grids: str = "affine") -> Make:
    return lambda task, seed: finer(make(task, seed), grids)


def finer_runs() -> list[str]:
    """Budgets below W4A8's against LoRA: the recipe for all budgets, and what finer grids of weights and inputs add."""
    head = ["task", "% of 32-bit", "grids", "LoRA", "q + ra", "difference"]
    head += ["training loss", "LoRA's", "bytes %", "W bits", "x bits", "rank"]
    rows = []
    for task in CURVE_TASKS:
        for budget in (MIXED, TIGHT):
            finer_ones = [(grids, _finer(_ours(budget), grids)) for grids in FINER]
            for name, ours in (("groups of 64", _ours(budget)), *finer_ones):
                found, difference = pairs(task, ours, lora), differences(task, ours, lora)
                if difference is None:
                    continue
                mine, theirs = zip(*found, strict=True)
                cells = [spread(Sample([o.score for o in side])) for side in (theirs, mine)]
                losses = [spread(Sample([o.loss for o in side])) for side in (mine, theirs)]
                share = f"{100 * budget / REFERENCE_RATIO:.2f}"
                costs = [_percent(o.weight_bytes for o in mine), *_learned(mine)]
                rows.append([task, share, name, *cells, interval(difference), *losses, *costs])
    return _table(head, rows)


def longer_runs() -> list[str]:
    """MRPC where 2-bit and 4-bit weights mix, against LoRA, with the usual epochs and with more."""

    def row(epochs: str, ours: Make, theirs: Make) -> list[str]:
        found = pairs("mrpc", ours, theirs)
        sides = zip(*((other.score, mine.score) for mine, other in found), strict=True)
        difference = differences("mrpc", ours, theirs)
        return [epochs, *(spread(Sample(side)) for side in sides), interval(difference)] if difference else []

    ours = _ours(MIXED)
    rows = [
        row(str(EPOCHS["mrpc"]), ours, lora),
        row(str(LONGER), lambda t, s: longer(ours(t, s)), lambda t, s: longer(lora(t, s))),
    ]
    return _table(["epochs", "LoRA", "q + ra", "difference"], filter(None, rows))


def curve() -> list[str]:
    """Score at each budget of all variants and placements, beside rounding and fixed gates of equal cost."""
    kinds = [(variant, placement) for placement in PLACEMENTS for variant in VARIANTS]
    head = ["task", "% of 32-bit", *(f"{v} {p}" for v, p in kinds)]
    head += ["q-ra merged, affine", "uniform", "rounded, groups of 64", "LoRA"]
    rows = []
    for task in CURVE_TASKS:
        for budget in BUDGETS:
            mine = [_score(_ours(budget, v, p)(task, FIRST_SEED)) for v, p in kinds]
            mine.append(_score(affine(task, budget, FIRST_SEED)))
            fixed = _score(uniform(task, UNIFORM[budget], "group", FIRST_SEED)) if budget in UNIFORM else NONE
            cells = [fixed, _rounded(task, budget), _score(lora(task, FIRST_SEED))]
            rows.append([task, f"{100 * budget / REFERENCE_RATIO:.2f}", *mine, *cells])
    return _table(head, rows)


def _best_rounded(task: str, budget: float, seed: int, grid: str = "group64") -> float | None:
    """The better fit of scales at the widths that cost what the budget allows."""
    widths = SAME_COST.get(budget)
    found = rounded(rounded_point(task, seed).name)
    scores = [
        next(iter(entry["scores"].values()))
        for name, entry in found.items()
        if widths is not None and name.startswith(f"{widths}-{grid}")
    ]
    return max(scores, default=None)


def _rounded(task: str, budget: float) -> str:
    best = _best_rounded(task, budget, FIRST_SEED)
    return NONE if best is None else f"{best:.2f}"


def rounding() -> list[str]:
    """Every scheme on every task: mean over seeds."""
    tasks = (*MAIN_TASKS, *ONE_SEED_TASKS)
    found = {t: [r for s in SEEDS if (r := rounded(rounded_point(t, s).name))] for t in tasks}
    theirs = {t: [r for s in SEEDS if (r := rounded(foreign(t, s).name))] for t in tasks}
    names = dict.fromkeys(n for group in (found, theirs) for runs in group.values() for run in runs for n in run)
    rows = []
    for name in names:
        entries = {t: [run[name] for run in (*found[t], *theirs[t]) if name in run] for t in tasks}
        first = next(entry for listed in entries.values() for entry in listed)
        cost = [_percent([first[key]]) if key in first else NONE for key in ("bops_share", "bytes_share")]
        cells = [spread(Sample([next(iter(e["scores"].values())) for e in v])) if v else NONE for v in entries.values()]
        rows.append([name, *cost, *cells])
    return _table(["scheme", "bops %", "bytes %", *tasks], rows)


def won_back() -> list[str]:
    """At each budget with rounding of equal cost: what LoRA loses by it, and what q + ra loses."""
    kinds = [("groups of 64", "group64", budget, _ours(budget)) for budget in SAME_COST]
    kinds += [("affine", "group64", budget, _affine(budget)) for budget in CLAIMED]
    kinds += [("affine", "group8-scale8", budget, _affine(budget)) for budget in (MIXED, TIGHT)]
    rows = []
    for task in (*MAIN_TASKS, *ONE_SEED_TASKS):
        for name, grid, budget, ours in kinds:
            lost = [
                (whole - best, other.score - mine.score)
                for seed in SEEDS
                if (mine := outcome(ours(task, seed).name))
                and (other := outcome(lora(task, seed).name))
                and (whole := before_rounding(rounded_point(task, seed).name)) is not None
                and (best := _best_rounded(task, budget, seed, grid)) is not None
            ]
            if lost:
                theirs, mine_ = Sample([a for a, _ in lost]), Sample([b for _, b in lost])
                share = f"{100 * (1 - mine_.mean / theirs.mean):.0f}" if theirs.mean > 0 else NONE
                rows.append([task, f"{100 * budget / REFERENCE_RATIO:.2f}", name, spread(theirs), spread(mine_), share])
    return _table(["task", "% of 32-bit", "grids", "lost by rounding", "lost by q + ra", "won back %"], rows)


def _permuted(*, finely: bool = False) -> Make:
    return lambda task, seed: permuted(task, TIGHT, seed, finely=finely)


def _fixed(widths: tuple[int, int]) -> Make:
    return lambda task, seed: uniform(task, widths, "group", seed)


def _width_name(widths: tuple[int, int]) -> str:
    return "uniform w{}a{}".format(*widths)


def allocations() -> list[str]:
    """Learned minus permuted and minus uniform, paired by seed; single seeds at other widths of the same cost."""
    others = [("permuted", _ours(TIGHT), _permuted())]
    others += [(_width_name(widths), _ours(budget), _fixed(widths)) for budget, widths in UNIFORM.items()]
    finely = [("permuted", _permuted(finely=True))]
    finely += [(_width_name(widths), _finer(_fixed(widths))) for widths in (UNIFORM[TIGHT], ALSO_UNIFORM)]
    others += [(f"{name}, affine", _affine(TIGHT), theirs) for name, theirs in finely]
    rows = []
    for task in CURVE_TASKS:
        for label, ours, theirs in others:
            found = pairs(task, ours, theirs)
            difference = differences(task, ours, theirs)
            if difference is not None:
                sides = list(zip(*found, strict=True))
                scores, losses = (
                    [spread(Sample([getattr(o, f) for o in side])) for side in sides] for f in ("score", "loss")
                )
                rows.append(
                    [
                        task,
                        label,
                        *scores,
                        interval(difference),
                        *losses,
                        *(_percent(o.bops for o in side) for side in sides),
                    ]
                )
    head = ["task", "against", "learned", "other", "difference"]
    head += [f"{side} {what}" for what in ("training loss", "bops %") for side in ("learned", "other")]
    extra = [
        f"- {task}: uniform w{ALSO_UNIFORM[0]}a{ALSO_UNIFORM[1]} (1.56 % of 32-bit) {_score(point)}"
        for task in CURVE_TASKS
        if outcome((point := uniform(task, ALSO_UNIFORM, "group", FIRST_SEED)).name) is not None
    ]
    return [*_table(head, rows), *(["", *extra] if extra else [])]


def adaptive() -> list[str]:
    """AdaLoRA against LoRA and against q + ra where that has LoRA's accuracy to keep."""
    rows = []
    for task in CURVE_TASKS:
        for label, theirs in (("LoRA", lora), ("q + ra at 6.25 %", _ours(0.25))):
            difference = differences(task, theirs, adalora)
            if difference is not None:
                found = pairs(task, theirs, adalora)
                sides = [spread(Sample([o.score for o in side])) for side in zip(*found, strict=True)]
                rows.append([task, label, *sides, interval(difference)])
    return _table(["task", "method", "its score", "AdaLoRA", "difference"], rows)


def letter() -> list[str]:
    """What the paper's schedule and penalty give."""
    rows = []
    for task in CURVE_TASKS:
        found = outcome(paper(task, FIRST_SEED).name)
        if found is not None:
            costs = [_percent([found.bops]), _percent([found.whole])]
            rows.append([task, f"{found.score:.2f}", _score(lora(task, FIRST_SEED)), *costs, *_learned([found])])
    return _table(["task", "score", "LoRA, all layers", "bops %", "whole bops %", "W bits", "x bits", "rank"], rows)
