"""Where a matrix lies: the order of layers and the short name of its row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from rankbits.records import ModuleRecord


def layer_order(module: ModuleRecord) -> float:
    """The number of its layer; infinity for a matrix outside the layers, which stands last."""
    return math.inf if module.layer is None else module.layer


def module_labels(modules: Sequence[ModuleRecord]) -> list[str]:
    """Layer and kind of each matrix, "3.query", or its full name where that would name two."""
    short = [module.kind if module.layer is None else f"{module.layer}.{module.kind}" for module in modules]
    counts = Counter(short)
    return [label if counts[label] == 1 else module.name for label, module in zip(short, modules, strict=True)]
