"""What a metric's name says of its values: their unit, and whether more of it is better or worse."""

from __future__ import annotations

UNITS = {"loss": "nats per token", "perplexity": "tokens"}
LOWER_IS_BETTER = frozenset(UNITS)


def unit(metric: str) -> str:
    """The unit of a metric's values: percent, unless it measures how much a language model was surprised."""
    return UNITS.get(metric, "percent")


def lower_is_better(metric: str) -> bool:
    """Whether the smaller of two values is the better one."""
    return metric in LOWER_IS_BETTER
