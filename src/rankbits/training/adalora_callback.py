"""AdaLoRA under the stock Hugging Face Trainer: each event is one call of its schedule."""

from __future__ import annotations

import warnings
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankbits.errors import RankbitsWarning, ScheduleError
from rankbits.training.adalora_schedule import AdaloraSchedule, fix_ranks, make_averages

STATE_NAME = "rankbits_adalora_schedule"
"""Under this name the schedule's state stands among those of callbacks in a checkpoint."""


class AdaloraCallback(TrainerCallback):
    """Moves AdaLoRA's ranks and applies its orthogonality penalty, once per optimizer step.

    Give it to the Trainer when that is made, with `callbacks=[AdaloraCallback()]`: the importance of ranks is part of
    its checkpoints, and has to have a place in the model before one is loaded.

    Args:
        schedule: a schedule made beforehand; None makes one when training begins.
        settings: keyword arguments of `AdaloraSchedule` (phases, orthogonality), if `schedule` is None.

    Raises:
        ScheduleError: both were given; when the Trainer is made, if no AdaLoRA adapter is in training; when training
            begins, if total or phases do not fit the run, or the Trainer runs a mode without whole gradients
            (DeepSpeed, FSDP, fp16 loss scaling); when it ends, if the schedule saw another number of steps than were
            made, or more ranks are left than the target.
    """

    def __init__(self, schedule: AdaloraSchedule | None = None, **settings: Any) -> None:
        if schedule is not None and settings:
            raise ScheduleError(f"give AdaloraCallback a schedule or its settings {sorted(settings)}, not both")
        self.schedule = schedule
        self.settings = settings
        self.penalty = 0.0

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make a place for the importance of ranks, which resuming fills before training begins."""
        make_averages(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make or check the schedule, and go to the step that training resumes at."""
        _refuse_unsupported(args)
        if self.schedule is None:
            self.schedule = AdaloraSchedule(kwargs["model"], state.max_steps, **self.settings)
        if self.schedule.budget.total_steps != state.max_steps:
            raise ScheduleError(
                f"AdaLoRA's schedule was made for {self.schedule.budget.total_steps} optimizer steps, but the Trainer "
                f"will make {state.max_steps}"
            )
        saved = _kept(state).get(STATE_NAME)
        if state.global_step > 0 and saved is not None:
            self.schedule.load_state_dict(saved)
        self.schedule.restore(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalty's gradient: after clipping, once however many batches were accumulated."""
        if self.schedule is not None:
            self.penalty = self.schedule.add_orthogonality_gradient()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the schedule: after the optimizer, which would move closed ranks, and before gradients are dropped."""
        if self.schedule is not None:
            self.schedule.step()
            # The Trainer writes this into a checkpoint's trainer_state.json and reads it from there.
            _kept(state)[STATE_NAME] = self.schedule.state_dict()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the mean rank that the budget allows and the penalty to the training logs."""
        if logs is None or self.schedule is None or "loss" not in logs:
            return
        allowed = self.schedule.budget.kept(self.schedule.completed_steps)
        values = {"rank_mean": allowed / max(1, len(self.schedule.kept())), "orthogonality": self.penalty}
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fix the ranks that are left, and raise if they are not what was asked for."""
        schedule = self.schedule
        if schedule is None or schedule.completed_steps != state.global_step:
            seen = 0 if schedule is None else schedule.completed_steps
            raise ScheduleError(
                f"the Trainer made {state.global_step} optimizer steps, but AdaLoRA's schedule saw {seen}: ranks are "
                "not what was asked for"
            )
        left = sum(fix_ranks(kwargs["model"]).values())
        if schedule.completed_steps < schedule.budget.total_steps:
            warnings.warn(
                f"training ended after {schedule.completed_steps} of {schedule.budget.total_steps} steps: AdaLoRA has "
                f"{left} ranks left, its target is {schedule.budget.target}",
                RankbitsWarning,
                stacklevel=2,
            )
        elif left > schedule.budget.target:
            raise ScheduleError(
                f"AdaLoRA has {left} ranks left, expected at most {schedule.budget.target}: its weights are not those "
                "of the last step (load_best_model_at_end takes them from a step with more ranks)"
            )


def _kept(state: TrainerState) -> dict[str, Any]:
    """What the Trainer keeps of callbacks by name; it makes a dictionary of the list that its annotation speaks of."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def _refuse_unsupported(args: TrainingArguments) -> None:
    for mode in ("deepspeed", "fsdp", "fp16"):
        if getattr(args, mode, None):
            raise ScheduleError(
                f"AdaloraCallback cannot read whole gradients under {mode}: train in one process or with "
                "DistributedDataParallel, in float32 or bf16"
            )
