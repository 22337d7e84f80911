"""Which figures a report has: those of each run, and those that put runs beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rankbits.records import RunRecord
from rankbits.reports.figures.bits import bits_by_matrix, bits_by_quantizer, bits_by_run
from rankbits.reports.figures.breakdown import cost_by_product
from rankbits.reports.figures.certainty import certainty
from rankbits.reports.figures.figure import Figure, Runs
from rankbits.reports.figures.files import write_figures
from rankbits.reports.figures.magnitude_by_direction import magnitude_by_direction
from rankbits.reports.figures.ranks import ranks
from rankbits.reports.figures.tradeoff import score_by_bops, score_by_bytes
from rankbits.reports.figures.training import training
from rankbits.reports.tables import labels

__all__ = ["Figure", "ReportFigures", "magnitude_by_direction", "report_figures", "write_figures"]

Maker = Callable[[Runs], Figure | None]
OF_ONE: tuple[Maker, ...] = (ranks, bits_by_quantizer, bits_by_matrix, certainty, training, cost_by_product)
OF_EACH: tuple[Maker, ...] = (bits_by_quantizer, bits_by_matrix, certainty, training)
OF_SEVERAL: tuple[Maker, ...] = (score_by_bops, score_by_bytes, ranks, bits_by_run, training, cost_by_product)
"""What stands in the comparison, ranks and costs, is not drawn again for each of its runs."""


@dataclass(frozen=True)
class ReportFigures:
    """The figures of a report: those that all runs share, and for each run its own."""

    shared: list[Figure]
    own: list[list[Figure]]

    def all(self) -> list[Figure]:
        """Every figure, in the order of the page."""
        return [*self.shared, *(figure for figures in self.own for figure in figures)]


def report_figures(records: Sequence[RunRecord]) -> ReportFigures:
    """The figures that have something to show. With several runs, those of the second are called `run-2-...`."""
    names = labels(records)
    runs = dict(zip(names, records, strict=True))
    if len(records) == 1:
        return ReportFigures([], [_made(OF_ONE, runs)])
    own = [
        [replace(figure, name=f"run-{number}-{figure.name}") for figure in _made(OF_EACH, {name: runs[name]})]
        for number, name in enumerate(names, start=1)
    ]
    return ReportFigures(_made(OF_SEVERAL, runs), own)


def _made(makers: Sequence[Maker], runs: Runs) -> list[Figure]:
    return [figure for make in makers if (figure := make(runs)) is not None]
