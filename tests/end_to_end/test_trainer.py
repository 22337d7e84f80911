"""The stock Trainer with our callback: penalty, evaluation, resuming, and what stops a run that goes wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from rankbits import (
    BayesianLoraConfig,
    GateSchedule,
    RankbitsCallback,
    harden,
    optimizer_and_scheduler,
    regularization_loss,
    summarize,
)
from rankbits.errors import NonFiniteError, RankbitsWarning, ScheduleError
from rankbits.training.callback import FiniteLossCallback
from rankbits.training.groups import GateRates
from rankbits.tuners.bayesian_lora import learning_adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
]
CLOSED = "ignore:.* has closed every gate"
AT_ONCE = {"lambda_q": 0.5, "lambda_r": 0.25, "phases": (0.0, 0.0, 0.0)}


def _rows(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, 100, (count, 6), generator=generator)
    return [{"input_ids": row.tolist(), "labels": int(row[0] > 50)} for row in ids]


def _model(**settings: Any) -> PeftModel:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    chosen = {"r": 3, "target_modules": ["query", "value"], "calibration_passes": 2, "modules_to_save": ["classifier"]}
    return get_peft_model(BertForSequenceClassification(config), BayesianLoraConfig(**(chosen | settings)))


def _arguments(folder: Path, **settings: Any) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 11,
    }
    return TrainingArguments(**(chosen | settings))


class GradientRecorder(TrainerCallback):
    """Remembers the gradients of the gates when its turn comes before an optimizer step."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = [p for _, _, gates in learning_adapters(kwargs["model"]) for p in gates.parameters()]
        self.steps.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])


def _penalty_gradients(folder: Path, *, batch: int, accumulation: int, custom_loss: bool) -> list[Tensor]:
    """What the callback added to the gradients of the gates in the first step."""
    model = _model()
    before, after = GradientRecorder(), GradientRecorder()
    settings: dict[str, Any] = {}
    if custom_loss:
        settings["compute_loss_func"] = lambda outputs, labels, **kwargs: F.cross_entropy(outputs.logits, labels)
    arguments = _arguments(
        folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1
    )
    schedule = GateSchedule(model, 1, **AT_ONCE)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_rows(32),
        optimizers=optimizer_and_scheduler(schedule, learning_rate=1e-3, rates=GateRates(gates=10.0)),
        callbacks=[before, RankbitsCallback(schedule), after],
        **settings,
    )
    trainer.train()
    assert len(after.steps) == 1
    return [new - old for old, new in zip(before.steps[0], after.steps[0], strict=True)]


@pytest.mark.filterwarnings(CLOSED)
@pytest.mark.parametrize("custom_loss", [False, True], ids=["own loss", "custom loss"])
def test_the_penalty_gradient_does_not_depend_on_accumulation(tmp_path, custom_loss) -> None:
    model = _model()
    GateSchedule(model, 1, **AT_ONCE)
    regularization_loss(model).backward()
    expected = [p.grad for _, _, gates in learning_adapters(model) for p in gates.parameters()]
    assert any(bool(grad.any()) for grad in expected)
    for batch, accumulation in ((32, 1), (4, 8)):
        gradients = _penalty_gradients(tmp_path, batch=batch, accumulation=accumulation, custom_loss=custom_loss)
        for mine, closed in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine, closed, rtol=0.0, atol=1e-6)


class PureLoss(TrainerCallback):
    """Compares nothing itself; keeps the evaluation metrics."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses.append(kwargs["metrics"]["eval_loss"])


@pytest.mark.filterwarnings(CLOSED)
def test_the_evaluation_loss_is_the_task_loss(tmp_path) -> None:
    model, seen, rows = _model(), PureLoss(), _rows(16)
    schedule = GateSchedule(model, 4, lambda_q=100.0, lambda_r=100.0, phases=(0.0, 0.0, 0.0))
    trainer = Trainer(
        model=model,
        args=_arguments(tmp_path, per_device_eval_batch_size=16),
        train_dataset=rows,
        eval_dataset=rows,
        optimizers=optimizer_and_scheduler(schedule, learning_rate=0.1, rates=GateRates(gates=2.0)),
        callbacks=[RankbitsCallback(schedule), seen],
    )
    trainer.train()
    trainer.evaluate()
    assert regularization_loss(model).item() > 50.0, "the penalty must be large enough to be seen in a loss"
    inputs = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        logits = model.eval()(input_ids=inputs).logits
    pure = F.cross_entropy(logits, torch.tensor([row["labels"] for row in rows]))
    assert seen.losses == [pytest.approx(pure.item(), abs=1e-5)]


def _train(folder: Path, *, steps: int, resume: str | None = None) -> tuple[PeftModel, list[dict[str, float]]]:
    model = _model(dropout=0.1, rank_gate="hard_concrete")
    schedule = GateSchedule(model, steps, lambda_q=0.5, lambda_r=0.5, phases=(0.25, 0.25, 0.25))
    optimizers = optimizer_and_scheduler(schedule, learning_rate=1e-2, rates=GateRates(gates=2.0, ranges=0.01))
    trainer = Trainer(
        model=model,
        args=_arguments(folder, max_steps=steps, save_strategy="steps", save_steps=2),
        train_dataset=_rows(20),
        optimizers=optimizers,
        callbacks=[RankbitsCallback(schedule)],
    )
    trainer.train(resume_from_checkpoint=resume)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return model, logs


@pytest.mark.parametrize("checkpoint", [2, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, checkpoint) -> None:
    whole, whole_logs = _train(tmp_path, steps=8)
    folder = str(tmp_path / f"checkpoint-{checkpoint}")
    resumed, resumed_logs = _train(tmp_path / "again", steps=8, resume=folder)
    keys = ("loss", "penalty", "bits_mean", "rank_mean", "lambda_q", "lambda_r")
    for a, b in zip(whole_logs[checkpoint:], resumed_logs[checkpoint:], strict=True):
        assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], rel=1e-5)
    states = whole.state_dict(), resumed.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert summarize(whole) == summarize(resumed)
    assert len({entry["penalty"] for entry in whole_logs}) > 3, "the runs must differ from standing still"


def test_phases_and_learning_show_in_the_logs_and_the_result_hardens(tmp_path) -> None:
    model, logs = _train(tmp_path, steps=8)
    assert [entry["lambda_q"] for entry in logs] == pytest.approx([0.0, 0.0, 0.25, 0.5, 0.5, 0.0, 0.0, 0.0])
    assert all("rank_mean" in entry and "bits_mean" in entry for entry in logs)
    model.eval()
    inputs = torch.tensor([row["input_ids"] for row in _rows(5)])
    expected = model(input_ids=inputs).logits
    torch.testing.assert_close(harden(model)(input_ids=inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_gates_under_the_optimizer_of_the_trainer_are_warned_about(tmp_path) -> None:
    trainer = Trainer(
        model=_model(),
        args=_arguments(tmp_path, learning_rate=1e-5),
        train_dataset=_rows(16),
        callbacks=[RankbitsCallback()],
    )
    with pytest.warns(RankbitsWarning, match="ranks and bits will hardly change"):
        trainer.train()


class SecondHand(TrainerCallback):
    """Steps a schedule that the callback steps as well."""

    def __init__(self, schedule: GateSchedule) -> None:
        self.schedule = schedule

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.schedule.step()


def test_a_schedule_that_saw_other_steps_is_an_error(tmp_path) -> None:
    model = _model()
    schedule = GateSchedule(model, 4)
    optimizers = optimizer_and_scheduler(schedule, learning_rate=1e-3)
    trainer = Trainer(
        model=model,
        args=_arguments(tmp_path),
        train_dataset=_rows(16),
        optimizers=optimizers,
        callbacks=[RankbitsCallback(schedule), SecondHand(schedule)],
    )
    with pytest.raises(ScheduleError, match="made for 4 optimizer steps and is stepped once more"):
        trainer.train()


class Sabotage(TrainerCallback):
    """Breaks one layer, or one gradient, at the third step."""

    def __init__(self, layer: torch.nn.Linear, parameter: torch.nn.Parameter | None) -> None:
        self.layer, self.parameter = layer, parameter

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 2:
            return
        if self.parameter is not None:
            self.parameter.register_hook(lambda grad: grad * float("nan"))
        else:
            with torch.no_grad():
                self.layer.bias[0] = float("nan")


def _contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Witness(TrainerCallback):
    """Remembers what a checkpoint held when it was written."""

    def __init__(self) -> None:
        self.contents: dict[str, dict[str, str]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.contents[folder.name] = _contents(folder)


@pytest.mark.parametrize("kind", ["loss", "gradient", "gradient without clipping"])
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, kind) -> None:
    model = _model(learn_bits=False)
    layer = model.get_submodule("base_model.model.bert.encoder.layer.1.intermediate.dense")
    query = model.get_submodule("base_model.model.bert.encoder.layer.1.attention.self.query")
    parameter = None if kind == "loss" else query.bayesian_lora_up["default"]
    witness = Witness()
    arguments = _arguments(
        tmp_path, save_strategy="steps", save_steps=1, max_grad_norm=0.0 if kind == "gradient without clipping" else 1.0
    )
    schedule = GateSchedule(model, 4)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_rows(16),
        optimizers=optimizer_and_scheduler(schedule, learning_rate=1e-3),
        callbacks=[RankbitsCallback(schedule), FiniteLossCallback(model), Sabotage(layer, parameter), witness],
    )
    if kind == "loss":
        said = r"at step 3; .*'base_model\.model\.bert\.encoder\.layer\.1\.intermediate\.dense'.*untouched"
    else:
        said = r"layer\.1\.attention\.self\.query\.bayesian_lora_up\.default' became NaN or infinite at step 3"
    with pytest.raises(NonFiniteError, match=said):
        trainer.train()
    assert sorted(witness.contents) == ["checkpoint-1", "checkpoint-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    for name, contents in witness.contents.items():
        assert _contents(tmp_path / name) == contents
    adapter = [p for name, p in model.named_parameters() if p.requires_grad]
    assert all(bool(torch.isfinite(p).all()) for p in adapter)
