"""Rank per layer and kind of matrix, a panel for each run on one colour scale (Bayesian-LoRA, figures 2 and 4)."""

from __future__ import annotations

import math

from rankbits.records import ModuleRecord, RunRecord
from rankbits.reports.figures.figure import Figure, Runs
from rankbits.reports.figures.heatmap import Grid, draw_grids
from rankbits.reports.figures.places import layer_order
from rankbits.reports.tables import has_learned_rank

COLUMNS = ("run", "task", "matrix", "layer", "kind", "rank", "max_rank", "expected_rank")


def ranks(runs: Runs) -> Figure | None:
    """The ranks of all runs that learned or pruned any; None if none did."""
    learned = {name: record for name, record in runs.items() if has_learned_rank(record)}
    if not learned:
        return None
    modules = [module for record in learned.values() for module in record.adapted()]
    top = max(1, *(module.max_rank for module in modules))
    grids = _grids(learned, titled=len(runs) > 1)
    low, high = min(module.rank for module in modules), max(module.rank for module in modules)
    of_runs = f"{len(learned)} runs, each " if len(learned) > 1 else ""
    scale = "; all runs share one colour scale" if len(learned) > 1 else ""
    return Figure(
        name="ranks",
        title="Rank of each matrix",
        reading=f"Rows are layers, columns kinds of matrix. The lighter, the nearer to rank {top}, the largest "
        f"allowed{scale}.",
        label=f"Heat map of ranks: {of_runs}{len(grids[0].rows)} layers by {len(grids[0].columns)} kinds of matrix, "
        f"from {low} to {high} of at most {top}.",
        columns=COLUMNS,
        rows=[
            (name, record.data.task, m.name, m.layer, m.kind, m.rank, m.max_rank, m.expected_rank)
            for name, record in learned.items()
            for m in record.adapted()
        ],
        draw=lambda: draw_grids(grids, lambda rank: rank / top),
    )


def _grids(runs: Runs, *, titled: bool) -> list[Grid]:
    """A grid for each run, with the layers and kinds of all of them, so that a place means the same in each."""
    modules = [module for record in runs.values() for module in record.adapted()]
    layers = sorted({layer_order(module) for module in modules})
    kinds = list(dict.fromkeys(module.kind for module in modules))
    rows = ["other" if layer == math.inf else f"layer {layer:.0f}" for layer in layers]
    return [
        Grid(rows, kinds, _mean_by_place(record, layers, kinds), name if titled else "")
        for name, record in runs.items()
    ]


def _mean_by_place(record: RunRecord, layers: list[float], kinds: list[str]) -> dict[tuple[int, int], float]:
    """Ranks by layer and kind; where several matrices share a place (experts, two towers), their mean."""
    found: dict[tuple[int, int], list[ModuleRecord]] = {}
    for module in record.adapted():
        found.setdefault((layers.index(layer_order(module)), kinds.index(module.kind)), []).append(module)
    return {place: sum(m.rank for m in modules) / len(modules) for place, modules in found.items()}
