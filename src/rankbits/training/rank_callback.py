"""DyLoRA under the stock Hugging Face Trainer: each event is one call of its schedule."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankbits.errors import ScheduleError
from rankbits.training.rank_schedule import DyloraSchedule


class DyloraCallback(TrainerCallback):
    """Draws the rank of each optimizer step with the Trainer's seed.

    Raises:
        ScheduleError: when training begins, if the model has no active DyLoRA adapter or the Trainer shards its
            parameters (DeepSpeed, FSDP); when it ends, if the schedule saw another number of steps than were made.
    """

    def __init__(self) -> None:
        self.schedule: DyloraSchedule | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the schedule at the step that training resumes at."""
        for mode, used in (("DeepSpeed", getattr(args, "deepspeed", None)), ("FSDP", getattr(args, "fsdp", None))):
            if used:
                raise ScheduleError(
                    f"DyloraCallback cannot put untrained rows back under {mode}, which shards parameters: train with "
                    "DistributedDataParallel or in one process"
                )
        self.schedule = DyloraSchedule(kwargs["model"], seed=args.seed)
        self.schedule.restore(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the next rank."""
        if self.schedule is not None:
            self.schedule.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the drawn rank, and raise if schedule and Trainer disagree about how far training went."""
        seen = 0 if self.schedule is None else self.schedule.completed_steps
        if self.schedule is not None:
            self.schedule.finish()
        if seen != state.global_step:
            raise ScheduleError(
                f"the Trainer made {state.global_step} optimizer steps, but DyLoRA's schedule saw {seen}: ranks were "
                "not drawn once per step"
            )
