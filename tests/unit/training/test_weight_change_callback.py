"""At every checkpoint the callback measures what a dense computation gives, and training goes on as without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from rankbits import WeightChangeCallback, weight_change
from rankbits.errors import ModelError, ScheduleError

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
ROWS = [{"input_ids": [index, 3, 5, 7], "labels": index % 2} for index in range(1, 9)]
QUERIES = [f"bert.encoder.layer.{index}.attention.self.query" for index in range(2)]


def _base() -> BertForSequenceClassification:
    torch.manual_seed(1)
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    return BertForSequenceClassification(config)


def _adapted(base: nn.Module, *, dora: bool) -> nn.Module:
    return get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], use_dora=dora))


def _train(model: nn.Module, folder: Path, *callbacks: TrainerCallback, save_strategy: str = "steps") -> None:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, save_steps=2, save_strategy=save_strategy, learning_rate=0.05,
        per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True, seed=5,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=ROWS, callbacks=list(callbacks)).train()


def _dense(model: nn.Module, *, dora: bool) -> dict[str, torch.Tensor]:
    """The queries' weights with the adapter in them, from its factors."""
    found = {}
    for name in QUERIES:
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        moved = layer.get_base_layer().weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        if dora:
            moved = layer.lora_magnitude_vector["default"].weight.unsqueeze(1) * moved / moved.norm(dim=1, keepdim=True)
        found[name] = moved.detach()
    return found


@pytest.mark.parametrize("dora", [False, True])
def test_points_are_those_of_a_dense_computation(tmp_path, dora) -> None:
    model = _adapted(_base(), dora=dora)
    callback = WeightChangeCallback(_base(), "ours", ["query"])
    _train(model, tmp_path, callback)
    assert [(point.step, point.layer) for point in callback.points] == [(s, q) for s in (2, 4) for q in QUERIES]
    assert {point.method for point in callback.points} == {"ours"}
    before = dict(_base().named_parameters())
    for point in callback.points[2:]:
        expected = weight_change(before[f"{point.layer}.weight"], _dense(model, dora=dora)[point.layer])
        assert point.magnitude == pytest.approx(expected.magnitude, rel=1e-4)
        assert point.direction == pytest.approx(expected.direction, rel=1e-4)
        assert point.direction > 1e-5
    assert callback.points[0].direction != callback.points[2].direction


def test_training_is_bit_for_bit_what_it_is_without(tmp_path) -> None:
    watched, plain = (_adapted(_base(), dora=True) for _ in range(2))
    _train(watched, tmp_path / "watched", WeightChangeCallback(watched, "dora", ["query", "value"]))
    _train(plain, tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters(), strict=True))


def test_without_adapters_the_weights_themselves_are_measured(tmp_path) -> None:
    model = _base()
    callback = WeightChangeCallback(model, "full", ["layer.1.attention.self.query"])
    _train(model, tmp_path, callback)
    assert [point.layer for point in callback.points] == [QUERIES[1]] * 2
    before, after = _base().get_submodule(QUERIES[1]).weight, model.get_submodule(QUERIES[1]).weight
    assert (callback.points[1].magnitude, callback.points[1].direction) == weight_change(before, after)


def test_layers_that_are_not_there_are_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"given uery, but no linear layer .* it has bert\.encoder\.layer\.0"):
        WeightChangeCallback(_base(), "full", ["uery"])
    callback = WeightChangeCallback(nn.Sequential(nn.Linear(2, 2)), "full", ["0"])
    with pytest.raises(ModelError, match="the model that trains has no linear layer 0, which it had"):
        _train(_base(), tmp_path, callback)


def test_a_run_without_checkpoints_is_refused(tmp_path) -> None:
    callback = WeightChangeCallback(_base(), "full", ["query"])
    with pytest.raises(ScheduleError, match="given save_strategy 'no', expected 'steps' or 'epoch'"):
        _train(_base(), tmp_path, callback, save_strategy="no")
