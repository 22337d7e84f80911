"""What is written down about a run: its record, its costs, and how files are written."""

from __future__ import annotations

from rankbits.records.certainty import DecidingGate, marginals, rank_gates, width_gates
from rankbits.records.costs import CostRecord, CountOptions, ElementWork, Product, WeightRecord
from rankbits.records.files import write_atomically
from rankbits.records.portable import recipe_hash, without_local_paths
from rankbits.records.run import (
    ADAPTER_SITES,
    SCHEMA_VERSION,
    SITES,
    BudgetRecord,
    DataRecord,
    ModuleRecord,
    ParameterRecord,
    RunRecord,
    ScoreRecord,
    Site,
    TrainingRecord,
)
from rankbits.records.weight_change import WeightChangeRecord

__all__ = [
    "ADAPTER_SITES",
    "SCHEMA_VERSION",
    "SITES",
    "BudgetRecord",
    "CostRecord",
    "CountOptions",
    "DataRecord",
    "DecidingGate",
    "ElementWork",
    "ModuleRecord",
    "ParameterRecord",
    "Product",
    "RunRecord",
    "ScoreRecord",
    "Site",
    "TrainingRecord",
    "WeightChangeRecord",
    "WeightRecord",
    "marginals",
    "rank_gates",
    "recipe_hash",
    "width_gates",
    "without_local_paths",
    "write_atomically",
]
