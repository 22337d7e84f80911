"""The names under which PEFT knows our tuners."""

from __future__ import annotations

import enum


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
