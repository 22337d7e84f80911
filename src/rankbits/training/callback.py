"""Glue to the stock Hugging Face Trainer: each event is one call into the files beside this one."""

from __future__ import annotations

import warnings
from statistics import fmean
from typing import Any, cast

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankbits.errors import NonFiniteError, RankbitsWarning, ScheduleError
from rankbits.gates.hard_concrete import OPEN_LOGIT
from rankbits.training.budget import Allocation
from rankbits.training.finite import (
    first_non_finite_gradient,
    first_non_finite_gradient_again,
    first_non_finite_module,
)
from rankbits.training.objective import add_regularization_gradient
from rankbits.training.schedule import GateSchedule
from rankbits.tuners.bayesian_lora import learning_adapters, summarize

MANUAL_LOOP = (
    "use a loop of your own: add regularization_loss(model) / accumulation_steps to the training loss and call "
    "GateSchedule(model, total_steps).step() after each optimizer step"
)


STATE_NAME = "rankbits_gate_schedule"
"""Under this name the schedule's state stands among those of callbacks in a checkpoint."""


class RankbitsCallback(TrainerCallback):
    """Steps the gate schedule and applies the penalty, once per optimizer step.

    Args:
        schedule: a schedule made beforehand (for `optimizer_and_scheduler`); None makes one when training begins.
        settings: keyword arguments of `GateSchedule`, if `schedule` is None.

    Raises:
        ScheduleError: both were given; when training begins, if the model has nothing to schedule, if the schedule is
            for another number of steps, or if the Trainer runs a mode in which gradients cannot be added (DeepSpeed,
            FSDP, fp16 loss scaling); when it ends, if the schedule saw another number of steps than were made.
    """

    def __init__(self, schedule: GateSchedule | None = None, **settings: Any) -> None:
        if schedule is not None and settings:
            raise ScheduleError(f"give RankbitsCallback a schedule or its settings {sorted(settings)}, not both")
        self.schedule = schedule
        self.settings = settings
        self.penalty = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make or check the schedule, and go to the step that training resumes at."""
        _refuse_unsupported(args)
        if self.schedule is None:
            self.schedule = GateSchedule(kwargs["model"], state.max_steps, **self.settings)
        if self.schedule.total_steps != state.max_steps:
            raise ScheduleError(
                f"the gate schedule was made for {self.schedule.total_steps} optimizer steps, but the Trainer will "
                f"make {state.max_steps}"
            )
        saved = _kept(state).get(STATE_NAME)
        if state.global_step > 0 and saved is not None:
            self.schedule.load_state_dict(saved)
        self.schedule.restore(state.global_step)
        _warn_if_gates_cannot_close(self.schedule, kwargs.get("optimizer"))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalty's gradient: after clipping, once however many micro-batches were accumulated."""
        self.penalty = add_regularization_gradient(kwargs["model"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the schedule."""
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
        """Add what is being learned to the training logs: mean bits, mean rank, penalty and its weights."""
        if logs is None or self.schedule is None or "loss" not in logs:
            return
        phase = self.schedule.phase()
        values = {**gate_means(kwargs["model"]), "penalty": self.penalty}
        values |= {"lambda_q": phase.lambda_q, "lambda_r": phase.lambda_r, **budget_values(self.schedule)}
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise if the schedule and the Trainer disagree about how far training went."""
        if self.schedule is None or self.schedule.completed_steps != state.global_step:
            seen = 0 if self.schedule is None else self.schedule.completed_steps
            raise ScheduleError(
                f"the Trainer made {state.global_step} optimizer steps, but the gate schedule saw {seen}: ranks and "
                "bits are not what was asked for"
            )
        self.schedule.replay.end(state.global_step)


def _kept(state: TrainerState) -> dict[str, Any]:
    """What the Trainer keeps of callbacks by name; it makes a dictionary of the list that its annotation speaks of."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def budget_values(schedule: GateSchedule) -> dict[str, float]:
    """Of each budget its limit, the cost, what is expected of it, its target by now and its dual variable."""
    values = {}
    for state in schedule.budgets():
        name = state.budget.quantity.value
        values[f"budget_{name}"] = state.cost
        values[f"budget_{name}_limit"] = state.budget.limit
        values[f"budget_{name}_expected"] = state.expected
        values[f"budget_{name}_target"] = state.target
        values[f"mu_{name}"] = state.mu
    return values


def gate_means(model: nn.Module) -> dict[str, float]:
    """Mean rank over adapted layers and mean bits over all quantizers, then by site, with the gates of inference."""
    names = {name for _, name, _ in learning_adapters(model)}
    summaries = [summary for name in sorted(names) for summary in summarize(model, name)]
    ranks = [summary.rank for summary in summaries if summary.max_rank]
    means = {"rank_mean": fmean(ranks)} if ranks else {}
    bits = [width for summary in summaries for width in summary.bits.values()]
    if bits:
        means["bits_mean"] = fmean(bits)
    for site in dict.fromkeys(site for summary in summaries for site in summary.bits):
        means[f"bits_{site}"] = fmean(s.bits[site] for s in summaries if site in s.bits)
    return means


def _refuse_unsupported(args: TrainingArguments) -> None:
    unsupported = {
        "DeepSpeed": getattr(args, "deepspeed", None),
        "FSDP": getattr(args, "fsdp", None),
        "fp16 loss scaling (bf16 works)": getattr(args, "fp16", False),
    }
    for mode, used in unsupported.items():
        if used:
            raise ScheduleError(f"RankbitsCallback cannot add the penalty's gradient under {mode}: {MANUAL_LOOP}")


def _warn_if_gates_cannot_close(schedule: GateSchedule, optimizer: Any) -> None:
    """Say so if the gates' learning rate cannot move them to their threshold within this run."""
    if schedule.allocation is Allocation.EVIDENCE:
        return
    logits = {id(p): p for _, _, gates in learning_adapters(schedule.model) for p in gates.parameters() if p.numel()}
    groups = getattr(optimizer, "param_groups", [])
    for group in groups:
        mine = [logits[id(p)] for p in group["params"] if id(p) in logits]
        if not mine:
            continue
        distance = max(float(p.detach().max()) for p in mine) - OPEN_LOGIT
        # With growing gradients Adam's steps exceed its learning rate, by a factor of at most about three.
        reach = 3.0 * float(group.get("initial_lr", group["lr"])) * schedule.penalised_steps
        if reach < distance or group.get("weight_decay"):
            warnings.warn(
                f"the gates are in an optimizer group with learning rate {group['lr']:.2g} and weight decay "
                f"{group.get('weight_decay', 0.0):.2g}: in {schedule.penalised_steps} penalised steps they move by at "
                f"most {reach:.2g} of the {distance:.2g} they are from closing, so ranks and bits will hardly change. "
                "Give the Trainer optimizers=rankbits.optimizer_and_scheduler(schedule, learning_rate=...)",
                RankbitsWarning,
                stacklevel=2,
            )
            return


class FiniteLossCallback(TrainerCallback):
    """Stops training before a NaN or infinite loss or gradient reaches the weights or a checkpoint.

    Args:
        model: the model that the Trainer trains.
    """

    def __init__(self, model: nn.Module) -> None:
        self.completed_steps = 0
        self._checking = False
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        model.register_forward_hook(self._check_loss, with_kwargs=True)

    def _check_loss(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        loss = getattr(output, "loss", None)
        if model.training:
            self._inputs = args, kwargs
        if self._checking or not model.training or not isinstance(loss, Tensor) or bool(loss.isfinite().all()):
            return
        self._checking = True
        try:
            culprit = first_non_finite_module(model, args, kwargs)
        finally:
            self._checking = False
        where = f"the first layer whose output is not finite is {culprit!r}" if culprit else "every layer is finite"
        raise NonFiniteError(
            f"the loss became {float(loss.detach())} at step {self.completed_steps + 1}; {where}. The last checkpoint "
            "is untouched. A lower learning rate, or fp32 instead of half precision, is the usual cure"
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count optimizer steps."""
        self.completed_steps = state.global_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting where training resumes."""
        self.completed_steps = state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise before the optimizer can put a bad gradient into the weights."""
        model = kwargs["model"]
        name = first_non_finite_gradient(model)
        if name is not None:
            again = first_non_finite_gradient_again(model, *self._inputs) if self._inputs is not None else None
            raise NonFiniteError(
                f"the gradient of {again or name!r} became NaN or infinite at step {self.completed_steps + 1}, with a "
                "finite loss. The last checkpoint is untouched. A lower learning rate is the usual cure"
            )
