"""Under the stock Trainer AdaLoRA's ranks fall as its budget says, and a run resumes where it stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rankbits import AdaloraCallback
from rankbits.errors import RankbitsWarning, ScheduleError
from rankbits.training.adalora_schedule import adalora_layers

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
LOADS = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
ROWS = [{"input_ids": [index, 3, 5, 7], "labels": index % 2} for index in range(1, 17)]
STEPS = 8
SETTINGS = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2, "orth_reg_weight": 0.3}


def _base() -> BertForSequenceClassification:
    torch.manual_seed(1)
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return BertForSequenceClassification(config)


def _model(**settings: Any) -> PeftModel:
    chosen = {"total_step": STEPS, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"} | SETTINGS | settings
    return get_peft_model(_base(), AdaLoraConfig(**chosen))


class _Watching(TrainerCallback):
    """Writes down the ranks that are open after each step."""

    def __init__(self) -> None:
        self.kept: list[int] = []

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        layers = [layer for _, layer in adalora_layers(kwargs["model"])]
        self.kept.append(sum(int(layer.lora_E["default"].count_nonzero()) for layer in layers))


def _trainer(model: PeftModel, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 5,
    }
    arguments = TrainingArguments(**(chosen | settings))
    return Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:3], callbacks=list(callbacks))


def _equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_without_the_callback_ranks_never_change(tmp_path) -> None:
    watching = _Watching()
    _trainer(_model(), tmp_path, watching).train()
    assert watching.kept == [8] * STEPS


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_fall_once_per_optimizer_step(tmp_path, accumulation) -> None:
    watching, callback = _Watching(), AdaloraCallback()
    trainer = _trainer(
        model := _model(),
        tmp_path,
        callback,
        watching,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
    )
    trainer.train()
    # 4 + 4 (1 - 1/5)^3, (1 - 3/5)^3, cut; masked at 2, 4 and from 6 on.
    assert [watching.kept[step - 1] for step in (2, 4, 6, 7, 8)] == [6, 4, 4, 4, 4]
    assert watching.kept[0] == 8
    logged = [entry["rank_mean"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [4.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert all(entry["orthogonality"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 4


class _Gradients(TrainerCallback):
    """Keeps the gradients that the penalty adds in the first step."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.found:
            layers = [layer for _, layer in adalora_layers(kwargs["model"])]
            self.found = [layer.lora_A["default"].grad.clone() for layer in layers]


def test_the_penalty_is_not_multiplied_by_accumulated_batches(tmp_path) -> None:
    # E starts at zero, so that A has no gradient but the penalty's in the first step.
    found = []
    for accumulation in (1, 4):
        watching = _Gradients()
        trainer = _trainer(
            _model(), tmp_path, AdaloraCallback(), watching, gradient_accumulation_steps=accumulation, max_grad_norm=0.0
        )
        trainer.train()
        found.append(watching.found)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(bool(gradient.any()) for gradient in found[0])


def test_the_loss_of_evaluation_is_the_tasks(tmp_path) -> None:
    trainer = _trainer(model := _model(orth_reg_weight=5.0), tmp_path, AdaloraCallback())
    trainer.train()
    batch = {key: torch.tensor([row[key] for row in ROWS[:3]]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model.eval()(input_ids=batch["input_ids"]).logits, batch["labels"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_a_resumed_run_equals_one_that_was_not_cut(tmp_path) -> None:
    whole = _model()
    _trainer(whole, tmp_path / "whole", AdaloraCallback(), save_strategy="steps", save_steps=1).train()
    for cut in (3, 7):
        checkpoint = tmp_path / "whole" / f"checkpoint-{cut}"
        weights = load_file(checkpoint / "adapter_model.safetensors")
        assert {len(tensor) for name, tensor in weights.items() if name.endswith("lora_E")} == {4}
        resumed = _model()
        trainer = _trainer(resumed, tmp_path / "resumed", AdaloraCallback())
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert _equal(whole, resumed)
        assert resumed.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern


def test_a_checkpoint_without_importance_is_not_resumed_from(tmp_path) -> None:
    _trainer(_model(), tmp_path, save_strategy="steps", save_steps=4).train()
    trainer = _trainer(_model(), tmp_path, AdaloraCallback())
    with pytest.raises(ScheduleError, match="go on after step 4, but the importance of its ranks was not restored"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


PROGRAM = """
import sys, torch
from peft import PeftModel
from transformers import BertForSequenceClassification
model = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
print(model(input_ids=torch.tensor([[1, 3, 5, 7]])).logits.double().tolist(), "rankbits" in sys.modules)
"""


@pytest.mark.slow
def test_what_is_saved_holds_the_kept_ranks_and_peft_alone_loads_it(tmp_path) -> None:
    base = _base()
    base.save_pretrained(tmp_path / "base")
    trainer = _trainer(model := _model(), tmp_path / "run", AdaloraCallback())
    trainer.train()
    model.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(len(tensor) for name, tensor in weights.items() if name.endswith("lora_E")) == 4
    assert not any("averages" in name for name in weights)
    pattern = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 4
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([[1, 3, 5, 7]])).logits
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "base"), str(tmp_path / "adapter")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    ).stdout.split()
    assert answer.pop() == "False"
    torch.testing.assert_close(torch.tensor(json.loads("".join(answer))), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["deepspeed", "fsdp", "fp16"])
def test_modes_without_whole_gradients_are_refused(mode) -> None:
    with pytest.raises(ScheduleError, match=f"AdaloraCallback cannot read whole gradients under {mode}"):
        AdaloraCallback().on_train_begin(
            SimpleNamespace(**{mode: "yes"}), TrainerState(), TrainerControl(), model=_model()
        )


def test_a_model_without_adalora_is_refused_when_the_trainer_is_made(tmp_path) -> None:
    with pytest.raises(ScheduleError, match="BertForSequenceClassification has no AdaLoRA adapters in training"):
        _trainer(_base(), tmp_path, AdaloraCallback())


def test_steps_that_the_schedule_did_not_see_are_an_error() -> None:
    with pytest.raises(ScheduleError, match="made 3 optimizer steps, but AdaLoRA's schedule saw 0"):
        AdaloraCallback().on_train_end(SimpleNamespace(), TrainerState(global_step=3), TrainerControl(), model=_model())


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        control.should_training_stop = state.global_step == 4
        return control


def test_a_run_that_ends_early_says_what_is_left(tmp_path) -> None:
    with pytest.warns(RankbitsWarning, match="after 4 of 8 steps: AdaLoRA has 4 ranks left, its target is 4"):
        _trainer(_model(), tmp_path, AdaloraCallback(), _Stop()).train()


def test_ranks_beyond_the_target_at_the_end_are_an_error(tmp_path) -> None:
    callback, model = AdaloraCallback(), _model()
    _trainer(model, tmp_path, callback).train()
    for _, layer in adalora_layers(model):
        nn.init.ones_(layer.lora_E["default"])
    with pytest.raises(ScheduleError, match="has 8 ranks left, expected at most 4"):
        callback.on_train_end(SimpleNamespace(), TrainerState(global_step=STEPS), TrainerControl(), model=model)
