"""What a metric's name says of its values: their unit, and whether more of it is better or worse."""

from __future__ import annotations

UNITS = {"loss": "nats per token", "perplexity": "tokens"}
LOWER_IS_BETTER = frozenset(UNITS)
AT_RANK = " at rank "


def at_rank(metric: str, rank: int) -> str:
    """The name of a metric of a model that was used at one of several ranks."""
    return f"{metric}{AT_RANK}{rank}"


def unit(metric: str) -> str:
    """The unit of a metric's values: percent, unless it measures how much a language model was surprised."""
    return UNITS.get(_plain(metric), "percent")


def lower_is_better(metric: str) -> bool:
    """Whether the smaller of two values is the better one."""
    return _plain(metric) in LOWER_IS_BETTER


def _plain(metric: str) -> str:
    return metric.partition(AT_RANK)[0]
