"""What the schedule asks of one adapter at this moment, with the pressure of budgets."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from rankbits.tuners.bayesian_lora import GatePhase


@dataclass(frozen=True)
class BudgetPhase(GatePhase):
    """A phase in which budgets press gates one by one.

    Args:
        largest_stored: if given, widths are penalised by stored bytes, relative to the tensor with this many numbers.
        pressure: weights of the probability of each width gate [sites, 4] and rank gate [r - 1] of the layer in the
            penalty; None while nothing is pressed.
    """

    largest_stored: int | None = None
    pressure: tuple[Tensor, Tensor] | None = field(default=None, compare=False)
