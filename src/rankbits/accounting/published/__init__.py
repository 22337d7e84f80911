"""Published numbers beside what our formulas give: Tables 1 and 2 of Bayesian-LoRA, and parameter counts."""

from rankbits.accounting.published.cells import Row, Verdict
from rankbits.accounting.published.rows import PublishedTable, heading, rows

__all__ = ["PublishedTable", "Row", "Verdict", "heading", "rows"]
