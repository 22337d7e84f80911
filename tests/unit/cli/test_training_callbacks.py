"""Progress and Ctrl-C under the real Trainer, on a model of one weight."""

import io
import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import Trainer, TrainerCallback, TrainingArguments

from rankbits.cli.interrupt import StopAfterStep, stop_on_interrupt
from rankbits.cli.progress import ProgressCallback, progress, time_left

STEPS = 6


class OneWeight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.weight * x - labels) ** 2).mean()}


class InterruptAt(TrainerCallback):
    """Presses Ctrl-C in the middle of one step, `times` times."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step = step
        self.times = times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


class AddBits(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        logs |= {"bits_mean": 12.25, "rank_mean": 6.5}


def _trainer(folder: Path, *callbacks: TrainerCallback) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_steps=100,
        logging_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    rows = [{"x": torch.tensor(float(row)), "labels": torch.tensor(0.5 * row)} for row in range(8)]
    trainer = Trainer(model=OneWeight(), args=arguments, train_dataset=rows)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def _checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_ctrl_c_saves_the_step_and_training_resumes_from_it(tmp_path: Path):
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stop, pytest.raises(KeyboardInterrupt):
        _trainer(tmp_path, InterruptAt(3), stop).train()
    assert _checkpoints(tmp_path) == ["checkpoint-4"]
    assert signal.getsignal(signal.SIGINT) is before

    resumed = _trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS


def test_the_second_ctrl_c_stops_at_once(tmp_path: Path):
    with stop_on_interrupt() as stop, pytest.raises(KeyboardInterrupt):
        _trainer(tmp_path, InterruptAt(3, times=2), stop).train()
    assert _checkpoints(tmp_path) == []


def test_ctrl_c_outside_training_stops_at_once(tmp_path: Path):
    with stop_on_interrupt(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with stop_on_interrupt() as stop:
        _trainer(tmp_path, stop).train()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_first_ctrl_c_says_what_happens(capfd: pytest.CaptureFixture[str]):
    stop = StopAfterStep()
    stop.training = True
    stop.interrupt(signal.SIGINT, None)
    assert stop.asked
    assert "stopping after this step" in capfd.readouterr().err


def test_without_a_terminal_every_log_is_a_line(tmp_path: Path):
    out = io.StringIO()
    with progress(Console(file=out, width=40)) as bar:
        _trainer(tmp_path, AddBits(), bar).train()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["2/6", "4/6", "6/6", "6/6"]
    assert "loss " in lines[0]
    assert "mean bits 12.25  mean rank 6.50" in lines[0]
    assert lines[-1].endswith("0:00:00 left")


def test_under_budgets_what_is_spent_stands_beside_what_is_allowed():
    out = io.StringIO()
    bar = ProgressCallback(Console(file=out), clock=lambda: 0.0)
    trainer = _trainer(Path("unused"))
    logs = {"loss": 1.0, "bits_mean": 16.0, "budget_bits": 3.4979, "budget_bits_limit": 3.5, "budget_bops_limit": 0.25}
    logs |= {"budget_bops": 0.24996, "budget_bits_target": 5.0, "budget_bops_expected": 0.3}
    bar.on_train_begin(trainer.args, trainer.state, trainer.control)
    bar.on_log(trainer.args, trainer.state, trainer.control, logs)
    assert "loss 1.0000  mean bits 16.00  bops 0.25 (budget 0.25)  bits 3.498 (budget 3.5)  " in out.getvalue()


def test_on_a_terminal_there_is_a_bar(tmp_path: Path):
    out = io.StringIO()
    with progress(Console(file=out, force_terminal=True, width=120, color_system=None)) as bar:
        _trainer(tmp_path, AddBits(), bar).train()
    assert "6/6" in out.getvalue()
    assert "mean bits 12.25  mean rank 6.50" in out.getvalue()
    assert "step 2/6" not in out.getvalue()


def test_the_terminal_is_given_back_when_training_fails(tmp_path: Path):
    out = io.StringIO()
    hide, show = "\x1b[?25l", "\x1b[?25h"
    with (
        pytest.raises(KeyboardInterrupt),
        progress(Console(file=out, force_terminal=True, width=120)) as bar,
        stop_on_interrupt() as stop,
    ):
        _trainer(tmp_path, InterruptAt(3), bar, stop).train()
    assert hide in out.getvalue()
    assert out.getvalue().rstrip().endswith(show)


def test_time_left_counts_from_the_step_that_training_resumed_from():
    ticks = iter([100.0, 110.0])
    bar = ProgressCallback(Console(file=io.StringIO()), clock=lambda: next(ticks))
    trainer = _trainer(Path("unused"))
    trainer.state.global_step, trainer.state.max_steps = 50, 100
    bar.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.state.global_step = 60
    assert bar._text(trainer.state) == "0:00:40 left"


@pytest.mark.parametrize(
    ("elapsed", "done", "left", "text"),
    [(0.0, 0, 10, "-:--:--"), (10.0, 5, 5, "0:00:10"), (60.0, 1, 61, "1:01:00"), (5.0, 5, -1, "0:00:00")],
)
def test_time_left(elapsed: float, done: int, left: int, text: str):
    assert time_left(elapsed, done, left) == text
