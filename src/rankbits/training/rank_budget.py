"""How many ranks AdaLoRA may keep after each optimizer step: a closed formula of integers."""

from __future__ import annotations

from dataclasses import dataclass

from rankbits.errors import ScheduleError


@dataclass(frozen=True, slots=True)
class RankBudget:
    """The budget b(t) of Zhang et al. 2023 (AdaLoRA), section 3.3, equation 12.

    Args:
        initial: ranks of all layers together at the start, b(0).
        target: ranks that are left at the end, b(T).
        total_steps: optimizer steps T of the run.
        warmup_steps: steps t_i before the budget begins to fall.
        final_steps: steps t_f with the final ranks, at the end.
        interval: steps between two maskings while the budget falls.

    Raises:
        ScheduleError: the target exceeds the start, a number is out of range, or the phases leave the budget no step
            to fall in.
    """

    initial: int
    target: int
    total_steps: int
    warmup_steps: int = 0
    final_steps: int = 0
    interval: int = 1

    def __post_init__(self) -> None:
        """Check that the phases fit into the run."""
        if self.target > self.initial:
            raise ScheduleError(
                f"AdaLoRA's budget only falls, but target_r asks for {self.target} ranks in all where the adapter "
                f"starts with {self.initial}: expected target_r of at most init_r"
            )
        if self.target < 0 or self.warmup_steps < 0 or self.final_steps < 0 or self.interval < 1:
            raise ScheduleError(
                f"AdaLoRA needs target_r, tinit and tfinal of at least 0 and deltaT of at least 1, got target "
                f"{self.target}, tinit {self.warmup_steps}, tfinal {self.final_steps}, deltaT {self.interval}"
            )
        if self.warmup_steps >= self.last_change:
            raise ScheduleError(
                f"AdaLoRA's budget has no step to fall in: tinit {self.warmup_steps} + tfinal {self.final_steps} must "
                f"be below the {self.total_steps} optimizer steps of the run"
            )

    @property
    def last_change(self) -> int:
        """The step T - t_f after which the final ranks are chosen for good."""
        return self.total_steps - self.final_steps

    def kept(self, completed_steps: int) -> int:
        """The budget b(t) after so many optimizer steps, cut to a whole number.

        b(0) up to t_i, b(T) from T - t_f on, and b(T) + (b(0) - b(T)) (1 - (t - t_i) / (T - t_i - t_f))^3 between.
        """
        if completed_steps <= self.warmup_steps:
            return self.initial
        if completed_steps >= self.last_change:
            return self.target
        left = 1 - (completed_steps - self.warmup_steps) / (self.last_change - self.warmup_steps)
        return int((self.initial - self.target) * left**3 + self.target)

    def masks(self, completed_steps: int) -> bool:
        """Whether the ranks beyond the budget are closed after this step: every `interval`, from T - t_f on always."""
        if completed_steps >= self.last_change:
            return True
        return completed_steps > self.warmup_steps and completed_steps % self.interval == 0
