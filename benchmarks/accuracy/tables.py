"""The tables of the study, one a question, from what is in results/ and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import earlier
import points
from comparisons import (
    AGAINST,
    NONE,
    TASKS,
    against,
    claim_table,
    differences,
    learned_means,
    pairs,
    percent,
    share,
    spreads,
    table,
)
from comparisons import score as score_of
from outcomes import Sample, before_rounding, interval, outcome, rounded, spread
from points import (
    BUDGETS,
    CLAIMED,
    CURVE_TASKS,
    EQUAL_WIDTHS,
    FIRST_SEED,
    MIXED,
    PLACEMENTS,
    SEEDS,
    TIGHT,
    VARIANTS,
    Make,
    Point,
    adalora,
    foreign,
    lora,
    paper,
)

SAME_COST = {0.25: "w8a8", 0.125: "w4a8", 0.09375: "w3a8", 0.0625: "w2a8"}
"""Uniform widths of rounding whose bit operations equal a budget's."""
ROUNDED_GRIDS = {
    0.25: ("group64",),
    0.125: ("group64", "group16-scale8"),
    0.09375: ("group8-scale8",),
    0.0625: ("group8-scale8",),
}
"""The groups of rounding whose bytes are nearest to those of our grids at a budget; the better one counts."""
Section = tuple[str, Callable[[], list[str]]]


def report(*, of_earlier: bool = False) -> str:
    """All tables as Markdown: the study's, or those of the recipes before."""
    listed = earlier.POINTS if of_earlier else points.POINTS
    texts = [f"### {title}\n\n" + "\n".join(make()) for title, make in (_earlier() if of_earlier else _study())]
    trained = [p for p in listed if p.kind not in {points.Kind.ROUNDED, points.Kind.FOREIGN}]
    done = [found for p in trained if (found := outcome(p.name)) is not None]
    hours = sum(found.seconds for found in done) / 3600
    return "\n\n".join([*texts, f"{len(done)} of {len(trained)} points trained, in {hours:.1f} hours of one core.\n"])


def _study() -> list[Section]:
    return [
        ("Learning rates on held-out training rows", lambda: scores_of(points.rate_choices())),
        ("One choice changed, on held-out training rows", lambda: scores_of(points.ablations())),
        ("The claim: q + ra against LoRA", lambda: claim_table({b: _ours(b) for b in BUDGETS}, lora)),
        ("Score against budget", curve),
        ("LoRA rounded after training", rounding),
        ("What q + ra wins back of that", won_back),
        ("Learned against permuted and uniform widths, at equal cost", allocations),
        ("AdaLoRA", adaptive),
        ("The letter of the paper", letter),
    ]


def _earlier() -> list[Section]:
    return [
        ("On held-out training rows", lambda: scores_of(earlier.choices())),
        ("Groups of 64 against LoRA", lambda: claim_table({b: _coarse(b) for b in BUDGETS}, lora)),
        ("Finer grids after a fifth of the steps", lambda: claim_table({MIXED: _fine}, lora)),
        ("MRPC with more epochs", longer_runs),
        ("Learned against permuted and uniform widths, at equal cost", earlier_allocations),
        ("The other placement", separate),
    ]


def _ours(budget: float, variant: str = "q-ra", placement: str = points.DEFAULT_PLACEMENT) -> Make:
    return lambda task, seed: points.learned(task, budget, seed, variant, placement)


def _coarse(budget: float) -> Make:
    return lambda task, seed: earlier.learned(task, budget, seed)


def _fine(task: str, seed: int) -> Point:
    return earlier.fine(task, MIXED, seed)


def scores_of(listed: Sequence[Point]) -> list[str]:
    """Score and mean training loss of each point that is there."""
    found = [(point, one) for point in listed if (one := outcome(point.name)) is not None]
    rows = [(point.task, point.label, f"{one.score:.2f}", f"{one.loss:.3f}") for point, one in found]
    return table(["task", "run", "score", "training loss"], rows)


def curve() -> list[str]:
    """Score at each budget of all variants and placements, beside rounding and fixed gates of equal cost."""
    kinds = [(variant, placement) for placement in PLACEMENTS for variant in VARIANTS]
    head = ["task", "% of 32-bit", *(f"{v} {p}" for v, p in kinds), "uniform", "rounded", "LoRA"]
    rows = []
    for task in CURVE_TASKS:
        for budget in BUDGETS:
            mine = [score_of(_ours(budget, v, p)(task, FIRST_SEED)) for v, p in kinds]
            fixed = [score_of(points.uniform(task, w, FIRST_SEED)) for w in EQUAL_WIDTHS.get(budget, ())]
            best = best_rounded(task, budget, FIRST_SEED)
            others = [", ".join(fixed) or NONE, NONE if best is None else f"{best:.2f}"]
            rows.append([task, share(budget), *mine, *others, score_of(lora(task, FIRST_SEED))])
    return table(head, rows)


def best_rounded(task: str, budget: float, seed: int) -> float | None:
    """Score of the better fit of scales at the widths that cost what the budget allows; None while it is not there."""
    if budget not in SAME_COST:
        return None
    starts = tuple(f"{SAME_COST[budget]}-{grid}-" for grid in ROUNDED_GRIDS[budget])
    found = rounded(points.rounded(task, seed).name)
    scores = [next(iter(entry["scores"].values())) for name, entry in found.items() if name.startswith(starts)]
    return max(scores, default=None)


def rounding() -> list[str]:
    """Every scheme on every task: mean over seeds."""
    found = {t: [r for s in SEEDS if (r := rounded(points.rounded(t, s).name))] for t in TASKS}
    theirs = {t: [r for s in SEEDS if (r := rounded(foreign(t, s).name))] for t in TASKS}
    names = dict.fromkeys(n for group in (found, theirs) for runs in group.values() for run in runs for n in run)
    rows = []
    for name in names:
        entries = {t: [run[name] for run in (*found[t], *theirs[t]) if name in run] for t in TASKS}
        first = next(entry for listed in entries.values() for entry in listed)
        cost = [percent([first[key]]) if key in first else NONE for key in ("bops_share", "bytes_share")]
        cells = [spread(Sample([next(iter(e["scores"].values())) for e in v])) if v else NONE for v in entries.values()]
        rows.append([name, *cost, *cells])
    return table(["scheme", "bops %", "bytes %", *TASKS], rows)


def won_back() -> list[str]:
    """At each budget with rounding of equal cost: what LoRA loses by it, and what q + ra loses."""
    rows = []
    for task in TASKS:
        for budget in SAME_COST:
            lost = [
                (whole - best, other.score - mine.score)
                for seed in SEEDS
                if (mine := outcome(_ours(budget)(task, seed).name))
                and (other := outcome(lora(task, seed).name))
                and (whole := before_rounding(points.rounded(task, seed).name)) is not None
                and (best := best_rounded(task, budget, seed)) is not None
            ]
            if lost:
                theirs, mine_ = Sample([a for a, _ in lost]), Sample([b for _, b in lost])
                won = f"{100 * (1 - mine_.mean / theirs.mean):.0f}" if theirs.mean > 0 else NONE
                rows.append([task, share(budget), f"{len(lost)}", spread(theirs), spread(mine_), won])
    return table(["task", "% of 32-bit", "seeds", "lost by rounding", "lost by q + ra", "won back %"], rows)


def _width_name(widths: tuple[int, int]) -> str:
    return "uniform w{}a{}".format(*widths)


def _fixed(widths: tuple[int, int]) -> Make:
    return lambda task, seed: points.uniform(task, widths, seed)


def _coarsely_fixed(widths: tuple[int, int]) -> Make:
    return lambda task, seed: earlier.uniform(task, widths, seed)


def allocations() -> list[str]:
    """Learned minus permuted and minus uniform, paired by seed."""
    others = [("permuted", _ours(TIGHT), lambda task, seed: points.permuted(task, TIGHT, seed))]
    others += [(_width_name(w), _ours(budget), _fixed(w)) for budget, listed in EQUAL_WIDTHS.items() for w in listed]
    return _against(others)


def earlier_allocations() -> list[str]:
    """The same in groups of 64."""
    others = [("permuted", _coarse(TIGHT), lambda task, seed: earlier.permuted(task, TIGHT, seed))]
    others += [
        (_width_name(widths), _coarse(budget), _coarsely_fixed(widths)) for budget, widths in earlier.UNIFORM.items()
    ]
    return _against(others)


def _against(others: Sequence[tuple[str, Make, Make]]) -> list[str]:
    rows = [against(task, *other) for task in CURVE_TASKS for other in others]
    return table(AGAINST, filter(None, rows))


def longer_runs() -> list[str]:
    """MRPC where 2-bit and 4-bit weights mix, against LoRA, with the usual epochs and with more."""

    def row(epochs: int, ours: Make, theirs: Make) -> list[str] | None:
        difference = differences("mrpc", ours, theirs)
        if difference is None:
            return None
        sides = [spreads(list(side), "score") for side in zip(*pairs("mrpc", ours, theirs), strict=True)]
        return [f"{epochs}", *sides, interval(difference)]

    ours = _coarse(MIXED)
    usual = row(points.EPOCHS["mrpc"], ours, lora)
    more = row(earlier.LONGER, lambda t, s: earlier.longer(ours(t, s)), lambda t, s: earlier.longer(lora(t, s)))
    return table(["epochs", "q + ra", "LoRA", "difference"], filter(None, (usual, more)))


def separate() -> list[str]:
    """The one point of the paper's placement in groups of 64."""
    return scores_of([earlier.learned("stsb", points.NARROW, FIRST_SEED, placement) for placement in PLACEMENTS])


def adaptive() -> list[str]:
    """AdaLoRA against LoRA and against q + ra where that has LoRA's accuracy to keep."""
    rows = []
    for task in CURVE_TASKS:
        for label, theirs in (("LoRA", lora), (f"q + ra at {share(CLAIMED[0])} %", _ours(CLAIMED[0]))):
            difference = differences(task, theirs, adalora)
            if difference is not None:
                sides = [spreads(list(side), "score") for side in zip(*pairs(task, theirs, adalora), strict=True)]
                rows.append([task, label, *sides, interval(difference)])
    return table(["task", "method", "its score", "AdaLoRA", "difference"], rows)


def letter() -> list[str]:
    """What the paper's schedule and penalty give."""
    rows = []
    for task in CURVE_TASKS:
        found = outcome(paper(task, FIRST_SEED).name)
        if found is not None:
            scores = [f"{found.score:.2f}", score_of(lora(task, FIRST_SEED))]
            rows.append([task, *scores, percent([found.bops]), percent([found.whole]), *learned_means([found])])
    return table(["task", "score", "LoRA, all layers", "bops %", "whole bops %", "W bits", "x bits", "rank"], rows)
