"""What a running training shows, as a bar or as lines: loss, mean bits, mean rank, budgets and time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankbits.accounting.budget import Quantity

_SHOWN = (("loss", "loss", ".4f"), ("bits_mean", "mean bits", ".2f"), ("rank_mean", "mean rank", ".2f"))
_BUDGETS = {q.value: (f"budget_{q.value}", f"budget_{q.value}_limit") for q in Quantity}
"""What is logged of each budget: what is spent, and what is allowed."""
_KEPT = (*(key for key, _, _ in _SHOWN), *chain.from_iterable(_BUDGETS.values()))


class ProgressCallback(TrainerCallback):
    """Draws the progress of one training on a console.

    Args:
        console: where to draw. A terminal gets one bar, anything else one line per logging step.
        clock: seconds that only ever grow.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._values: dict[str, float] = {}
        self._started_at = 0.0
        self._first_step = 0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the clock and the bar, at the step that a resumed training continues from."""
        self._started_at = self._clock()
        self._first_step = state.global_step
        if not (state.is_world_process_zero and self._console.is_terminal):
            return
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
            console=self._console,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, description=self._text(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Keep the newest values; where there is no bar, print them."""
        fresh = {key: float(logs[key]) for key in _KEPT if logs and key in logs}
        self._values |= fresh
        if fresh and self._bar is None and state.is_world_process_zero:
            self.say(f"step {state.global_step}/{state.max_steps}  {self._text(state)}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Leave the finished bar on the screen."""
        self.close()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Give the terminal back. Closing twice is fine."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _text(self, state: TrainerState) -> str:
        shown = [f"{label} {self._values[key]:{form}}" for key, label, form in _SHOWN if key in self._values]
        for quantity, (spent, limit) in _BUDGETS.items():
            if limit in self._values:
                shown.append(f"{quantity} {self._values[spent]:.4g} (budget {self._values[limit]:g})")
        elapsed = self._clock() - self._started_at
        left = time_left(elapsed, state.global_step - self._first_step, state.max_steps - state.global_step)
        return "  ".join([*shown, f"{left} left"])


@contextmanager
def progress(console: Console) -> Iterator[ProgressCallback]:
    """The callback that draws on `console`; however training ends, the terminal is given back."""
    callback = ProgressCallback(console)
    try:
        yield callback
    finally:
        callback.close()


def time_left(elapsed_seconds: float, steps_done: int, steps_left: int) -> str:
    """Time for the remaining steps at the pace so far, as h:mm:ss; `-:--:--` before the first step."""
    if steps_done <= 0:
        return "-:--:--"
    seconds = round(elapsed_seconds / steps_done * max(steps_left, 0))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
