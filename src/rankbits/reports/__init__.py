"""What we say about runs: tables, figures and one page, drawn from records alone."""

from __future__ import annotations

from rankbits.reports.html import render
from rankbits.reports.tables import COLUMNS, run_table

__all__ = ["COLUMNS", "render", "run_table"]
