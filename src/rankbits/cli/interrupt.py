"""Ctrl-C while training: the first finishes the step and saves a checkpoint, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

NOTICE = "\nstopping after this step; Ctrl-C again stops at once, without a checkpoint\n"
_STDERR = 2


class StopAfterStep(TrainerCallback):
    """Saves a checkpoint at the end of the step in which a stop was asked for, then raises KeyboardInterrupt.

    It raises, instead of asking the Trainer to stop, so that no caller takes the unfinished training for a finished
    one. To see the checkpoint complete it has to be the last callback that hears of the saving.
    """

    def __init__(self) -> None:
        self.training = False
        self.asked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """From here on there is a step to finish."""
        self.training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Ask for a checkpoint."""
        if self.asked:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Stop: the checkpoint is complete."""
        if self.asked:
            raise KeyboardInterrupt

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """From here on there is nothing to wait for."""
        self.training = False

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT: ask once while training runs, else raise KeyboardInterrupt."""
        del number, frame
        if self.asked or not self.training:
            raise KeyboardInterrupt
        self.asked = True
        # A signal may arrive in the middle of a print, which cannot be entered twice; a plain write can.
        os.write(_STDERR, NOTICE.encode())


@contextmanager
def stop_on_interrupt() -> Iterator[StopAfterStep]:
    """Hand out the callback that Ctrl-C speaks to; the handler before it is put back at the end.

    Outside the main thread, where Python delivers no signals, the callback never stops anything.
    """
    stop = StopAfterStep()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGINT, stop.interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
