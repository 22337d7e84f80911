"""The glue to the Trainer: what it refuses, what it warns about, what it logs."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from rankbits import GateSchedule, RankbitsCallback, optimizer_and_scheduler
from rankbits.errors import RankbitsWarning, ScheduleError
from rankbits.training.callback import gate_means
from rankbits.tuners.bayesian_lora import adapted_layers, learning_adapters

ARGS = SimpleNamespace(deepspeed=None, fsdp=[], fp16=False)


def _state(step: int = 0, steps: int = 10) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=steps, log_history=[], stateful_callbacks={})


def test_the_schedule_is_made_for_the_steps_of_the_trainer(adapted) -> None:
    callback = RankbitsCallback(lambda_q=0.5, phases=(0.0, 0.0, 0.5))
    callback.on_train_begin(ARGS, _state(), None, model=adapted())
    assert callback.schedule.total_steps == 10
    assert callback.schedule.phase().lambda_q == 0.5


def test_a_schedule_and_its_settings_are_not_both_given(adapted) -> None:
    with pytest.raises(ScheduleError, match=r"settings \['lambda_q'\], not both"):
        RankbitsCallback(GateSchedule(adapted(), 4), lambda_q=1.0)


def test_a_schedule_for_other_steps_is_refused(adapted) -> None:
    model = adapted()
    with pytest.raises(ScheduleError, match=r"made for 4 optimizer steps, but the Trainer will make 10"):
        RankbitsCallback(GateSchedule(model, 4)).on_train_begin(ARGS, _state(), None, model=model)


def test_a_model_without_adapter_is_refused() -> None:
    with pytest.raises(ScheduleError, match="no active Bayesian-LoRA adapter"):
        RankbitsCallback().on_train_begin(ARGS, _state(), None, model=torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("mode", "said"),
    [({"deepspeed": "x.json"}, "DeepSpeed"), ({"fsdp": ["full_shard"]}, "FSDP"), ({"fp16": True}, "fp16")],
)
def test_modes_in_which_gradients_cannot_be_added_are_refused(adapted, mode, said) -> None:
    args = SimpleNamespace(**(vars(ARGS) | mode))
    with pytest.raises(ScheduleError, match=rf"{said}.*regularization_loss\(model\) / accumulation_steps"):
        RankbitsCallback().on_train_begin(args, _state(), None, model=adapted())


def test_training_resumes_at_the_step_of_the_trainer(adapted) -> None:
    model = adapted()
    callback = RankbitsCallback(phases=(0.0, 0.0, 0.5))
    callback.on_train_begin(ARGS, _state(step=7), None, model=model)
    assert callback.schedule.completed_steps == 7
    assert not any(p.requires_grad for _, _, gates in learning_adapters(model) for p in gates.parameters())


def test_the_end_must_agree_with_the_trainer(adapted) -> None:
    model = adapted()
    callback = RankbitsCallback()
    callback.on_train_begin(ARGS, _state(), None, model=model)
    for _ in range(3):
        callback.on_optimizer_step(ARGS, _state(), None, model=model)
    callback.on_train_end(ARGS, _state(step=3), None, model=model)
    with pytest.raises(ScheduleError, match="made 5 optimizer steps, but the gate schedule saw 3"):
        callback.on_train_end(ARGS, _state(step=5), None, model=model)
    with pytest.raises(ScheduleError, match="the gate schedule saw 0"):
        RankbitsCallback().on_train_end(ARGS, _state(step=5), None, model=model)


@pytest.mark.parametrize(("rate", "decay", "warns"), [(1e-4, 0.0, True), (1.0, 0.0, False), (1.0, 0.01, True)])
def test_gates_in_the_group_of_the_task_that_cannot_close_are_warned_about(adapted, rate, decay, warns) -> None:
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    callback = RankbitsCallback()
    if warns:
        with pytest.warns(RankbitsWarning, match="ranks and bits will hardly change") as record:
            callback.on_train_begin(ARGS, _state(), None, model=model, optimizer=optimizer)
        assert len(record) == 1
        assert "rankbits.optimizer_and_scheduler(schedule" in str(record[0].message)
    else:
        callback.on_train_begin(ARGS, _state(), None, model=model, optimizer=optimizer)


def test_our_own_groups_raise_no_warning(adapted) -> None:
    model = adapted()
    schedule = GateSchedule(model, 10)
    optimizer, _ = optimizer_and_scheduler(schedule, learning_rate=1e-5, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RankbitsCallback(schedule).on_train_begin(ARGS, _state(), None, model=model, optimizer=optimizer)


def test_training_logs_say_what_is_learned(adapted) -> None:
    model = adapted()
    callback = RankbitsCallback(lambda_q=0.5, lambda_r=0.25, phases=(0.0, 0.0, 0.0))
    state = _state()
    callback.on_train_begin(ARGS, state, None, model=model)
    callback.on_pre_optimizer_step(ARGS, state, None, model=model)
    state.log_history.append({"loss": 1.0, "step": 1})
    logs = {"loss": 1.0}
    callback.on_log(ARGS, state, None, logs=logs, model=model)
    assert logs["rank_mean"] == 4.0
    assert logs["bits_mean"] == 32.0
    assert (logs["lambda_q"], logs["lambda_r"]) == (0.5, 0.25)
    assert logs["penalty"] == pytest.approx(0.5 * 14 * 3.99499 + 0.25 * 2 * 2.9852, rel=1e-3)
    assert state.log_history[-1]["penalty"] == logs["penalty"]
    evaluation = {"eval_loss": 1.0}
    callback.on_log(ARGS, state, None, logs=evaluation, model=model)
    assert evaluation == {"eval_loss": 1.0}


def test_means_leave_out_what_is_not_learned(adapted) -> None:
    assert gate_means(torch.nn.Linear(2, 2)) == {}
    assert gate_means(adapted(learn_bits=False)) == {"rank_mean": 4.0}


@torch.no_grad()
def test_means_by_site_are_those_of_the_layers_that_have_it(adapted) -> None:
    model = adapted(quantizers=["weight", "up"])
    first = next(layer for _, layer in adapted_layers(model))
    first.gates_of("default").bit_logits[0, 2:] = -6.0  # the first row is W0's: 16 and 32 bits are closed
    layers = len(list(adapted_layers(model)))
    means = gate_means(model)
    assert means["bits_up"] == 32.0
    assert means["bits_weight"] == pytest.approx((8 + 32 * (layers - 1)) / layers)
    assert means["bits_mean"] == pytest.approx((means["bits_up"] + means["bits_weight"]) / 2)


def test_logs_say_where_each_budget_stands(adapted) -> None:
    model = adapted()
    callback = RankbitsCallback(budget=["bits=8", "rank=2"])
    state = _state()
    callback.on_train_begin(ARGS, state, None, model=model)
    logs = {"loss": 1.0}
    callback.on_log(ARGS, state, None, logs=logs, model=model)
    assert (logs["budget_bits"], logs["budget_bits_target"], logs["mu_bits"]) == (32.0, 8.0, 0.0)
    assert 31.0 < logs["budget_bits_expected"] < 32.0
    assert (logs["budget_bits_limit"], logs["budget_rank_limit"]) == (8.0, 2.0)
    assert (logs["budget_rank"], logs["budget_rank_target"], logs["mu_rank"]) == (4.0, 2.0, 0.0)


def test_dual_variables_go_through_the_trainer_s_checkpoint(adapted) -> None:
    first, state = RankbitsCallback(budget="bits=8", allocation="descent"), _state()
    model = adapted()
    first.on_train_begin(ARGS, state, None, model=model)
    for step in range(1, 6):
        state.global_step = step
        first.on_optimizer_step(ARGS, state, None, model=model)
    kept = SimpleNamespace(**json.loads(json.dumps(vars(state))))
    second = RankbitsCallback(budget="bits=8", allocation="descent")
    second.on_train_begin(ARGS, kept, None, model=model)
    assert second.schedule.budgets() == first.schedule.budgets()
    assert second.schedule.budgets()[0].mu > 1e-3
    assert second.schedule.completed_steps == 5
    other = RankbitsCallback(budget="bits=4", allocation="descent")
    with pytest.raises(ScheduleError, match="the checkpoint's budgets are"):
        other.on_train_begin(ARGS, kept, None, model=model)
