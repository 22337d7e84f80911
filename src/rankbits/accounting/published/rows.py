"""The published tables by name, row by row, and the convention each was computed under."""

from __future__ import annotations

from enum import Enum

from rankbits.accounting.published import memory, operations
from rankbits.accounting.published.cells import Row
from rankbits.accounting.published.parameters import count_rows, read_groups

PAPER_RANK = 8
"""The rank that Bayesian-LoRA starts from in both tables."""
_OPERATIONS = (
    "{model}, T = S = {tokens} tokens, batch 1, {positions} position rows recomputed, adapters unmerged on query, key "
    "and value, 32 x 32 bits, no head; 100 % is LoRA with r = {rank}: {macs:,} MACs, {bops:,} bit operations. "
    "Whatever the widths, an integer kernel can execute at most {bound:.1f} % of the MACs at r = {bound_rank}. "
    "The paper states neither T nor the reference of a row: this is the convention that fits."
)


class PublishedTable(str, Enum):
    """What can be recomputed."""

    TABLE1 = "table1"
    TABLE2 = "table2"
    PARAMETERS = "parameters"
    MEMORY = "memory"


def rows(table: PublishedTable) -> list[Row]:
    """All cells of a table. The parameter counts are those of every source, Table 1's among them."""
    if table is PublishedTable.TABLE1:
        return count_rows(operations.table1().counts) + operations.operation_rows_of_table1()
    if table is PublishedTable.TABLE2:
        return operations.rows_of_table2()
    if table is PublishedTable.MEMORY:
        return memory.memory_rows()
    return count_rows(operations.table1().counts + read_groups("parameters.json"))


def heading(table: PublishedTable) -> str:
    """The convention under which a table was recomputed, with the absolute cost of what is called 100 %."""
    if table is PublishedTable.MEMORY:
        return memory.heading()
    if table is PublishedTable.PARAMETERS:
        return (
            "Parameters trained, head excluded unless the cell is a whole model; a percentage is "
            "trained / (base + trained)."
        )
    whole = operations.macs(operations.REFERENCE_RANK)
    return _OPERATIONS.format(
        model=operations.MODEL,
        tokens=operations.TOKENS,
        positions=operations.shape().attentions()[0].position_rows,
        rank=operations.REFERENCE_RANK,
        macs=whole,
        bops=whole * 32 * 32,
        bound=operations.integer_bound(PAPER_RANK),
        bound_rank=PAPER_RANK,
    )
