"""Under the stock Trainer the rank is drawn once per optimizer step, and a run resumes where it stopped."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rankbits import DyloraCallback, DyloraConfig
from rankbits.errors import ScheduleError
from rankbits.training.rank_schedule import drawn_rank
from rankbits.tuners.dylora import adapted_layers

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
ROWS = [{"input_ids": [index, 3, 5, 7], "labels": index % 2} for index in range(1, 13)]


def _model() -> PeftModel:
    torch.manual_seed(1)
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return get_peft_model(BertForSequenceClassification(config), DyloraConfig(r=4, target_modules=["query", "value"]))


class _Watching(TrainerCallback):
    """Writes down the rank that each micro-batch ran at."""

    def __init__(self, model: PeftModel) -> None:
        self.ranks: list[tuple[int, int]] = []
        (_, layer), *_ = adapted_layers(model)
        layer.register_forward_hook(lambda module, *_: self.ranks.append((self.step, module.rank_in_use("default"))))
        self.step = 0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step = state.global_step


def _trainer(model: PeftModel, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 5,
    }
    arguments = TrainingArguments(**(chosen | settings))
    return Trainer(model=model, args=arguments, train_dataset=ROWS, callbacks=list(callbacks))


def test_micro_batches_of_a_step_share_its_rank(tmp_path) -> None:
    model = _model()
    watching, callback = _Watching(model), DyloraCallback()
    _trainer(model, tmp_path, callback, watching, gradient_accumulation_steps=3).train()
    expected = [(step, drawn_rank(5, step, 4)) for step in range(4) for _ in range(3)]
    assert watching.ranks == expected
    assert callback.schedule is not None
    assert callback.schedule.ranks() == {}


def test_a_resumed_run_equals_one_that_was_not_cut(tmp_path) -> None:
    whole = _model()
    _trainer(whole, tmp_path / "whole", DyloraCallback(), save_strategy="steps", save_steps=2).train()
    resumed = _model()
    trainer = _trainer(resumed, tmp_path / "resumed", DyloraCallback())
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    moved = [n for n, p in whole.named_parameters() if p.requires_grad and bool(p.detach().any())]
    assert moved
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["deepspeed", "fsdp"])
def test_sharded_parameters_are_refused(mode) -> None:
    with pytest.raises(ScheduleError, match="DyloraCallback cannot put untrained rows back under"):
        DyloraCallback().on_train_begin(
            SimpleNamespace(**{mode: "yes"}), TrainerState(), TrainerControl(), model=_model()
        )


def test_steps_that_the_schedule_did_not_see_are_an_error(tmp_path) -> None:
    callback = DyloraCallback()
    arguments = SimpleNamespace(seed=0)
    callback.on_train_begin(arguments, TrainerState(), TrainerControl(), model=_model())
    with pytest.raises(ScheduleError, match="made 3 optimizer steps, but DyLoRA's schedule saw 0"):
        callback.on_train_end(arguments, TrainerState(global_step=3), TrainerControl())
