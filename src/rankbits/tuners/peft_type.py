"""The names under which PEFT knows our tuners, and the form in which it keeps the names of modules."""

from __future__ import annotations

import enum
from typing import Any


class RankbitsPeftType(str, enum.Enum):
    """PEFT types of this package.

    PEFT's own `PeftType` is closed; any other string enumeration of the same kind works in its tables, and one of our
    own pickles by reference to this module.
    """

    BAYESIAN_LORA = "BAYESIAN_LORA"
    BOTTLENECK = "BOTTLENECK"
    DYLORA = "DYLORA"
    SBORA = "SBORA"
    MORA = "MORA"


def is_integer(value: object) -> bool:
    """Whether a field of a configuration holds a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def names_as_sets(config: Any) -> None:
    """Make sets of a configuration's lists of module names, as PEFT compares and stores them.

    Args:
        config: a `PeftConfig` with `target_modules` and `exclude_modules`, changed in place.
    """
    for key in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, key), list):
            setattr(config, key, set(getattr(config, key)))
