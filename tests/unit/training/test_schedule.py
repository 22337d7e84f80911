"""The schedule is a function of the completed steps: phases begin where they should, and resuming changes nothing."""

import pytest
import torch
from torch import nn

from rankbits import BayesianLoraConfig, GateSchedule, regularization_loss
from rankbits.errors import RankbitsWarning, ScheduleError
from rankbits.training.schedule import penalty_fraction
from rankbits.tuners.bayesian_lora import adapted_layers, learning_adapters


def _phases(model: nn.Module) -> list:
    return [layer.phase[name] for layer, name, _ in learning_adapters(model)]


def test_phases_begin_at_exact_steps(adapted) -> None:
    model = adapted()
    schedule = GateSchedule(model, 20, lambda_q=0.8, lambda_r=0.4, phases=(0.25, 0.25, 0.25))
    seen = []
    for step in range(21):
        (phase, other) = _phases(model)
        assert phase == other == schedule.phase()
        assert phase.lambda_r == pytest.approx(phase.lambda_q / 2)
        seen.append((phase.lambda_q, phase.fixed))
        if step < 20:
            schedule.step()
    ramp = [0.8 * k / 5 for k in range(5)]
    assert [value for value, _ in seen] == pytest.approx([0.0] * 5 + ramp + [0.8] * 5 + [0.0] * 6)
    assert [fixed for _, fixed in seen] == [False] * 15 + [True] * 6
    assert (schedule.warmup_steps, schedule.fixed_from, schedule.penalised_steps) == (5, 15, 10)


def test_the_letter_of_the_paper_has_no_phases(adapted) -> None:
    model = adapted()
    schedule = GateSchedule(model, 4, lambda_q=1.0, lambda_r=1.0, phases=(0.0, 0.0, 0.0))
    for _ in range(4):
        assert _phases(model)[0].lambda_q == 1.0
        schedule.step()
    assert not _phases(model)[0].fixed
    assert schedule.penalised_steps == 4


@pytest.mark.parametrize(
    ("progress", "warmup", "ramp", "share"),
    [(0.0, 0.0, 0.0, 1.0), (0.19, 0.2, 0.4, 0.0), (0.2, 0.2, 0.4, 0.0), (0.3, 0.2, 0.4, 0.25), (0.9, 0.2, 0.4, 1.0)],
)
def test_share_of_the_penalty(progress, warmup, ramp, share) -> None:
    assert penalty_fraction(progress, warmup=warmup, ramp=ramp) == pytest.approx(share)


def test_fixed_gates_do_not_move_with_the_momentum_of_adam(adapted, rows) -> None:
    model = adapted().train()
    schedule = GateSchedule(model, 8, lambda_q=1.0, lambda_r=1.0, phases=(0.0, 0.0, 0.5))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gates = [p for _, _, g in learning_adapters(model) for p in g.parameters()]
    ranges = [q.log_range for _, la in adapted_layers(model) for q in la.bayesian_lora_quantizers["default"].values()]
    for step in range(8):
        before = [p.detach().clone() for p in gates]
        before_ranges = [p.detach().clone() for p in ranges]
        optimizer.zero_grad()
        (model(rows).pow(2).sum() + regularization_loss(model)).backward()
        optimizer.step()
        schedule.step()
        moved = [not torch.equal(old, new) for old, new in zip(before, gates, strict=True)]
        assert moved == [step < 4] * len(gates), step
    assert any(not torch.equal(old, new) for old, new in zip(before_ranges, ranges, strict=True))


def test_fixed_gates_stay_frozen_when_the_adapter_is_activated_again(adapted) -> None:
    model = adapted()
    GateSchedule(model, 4, phases=(0.0, 0.0, 0.5)).restore(2)
    model.add_adapter("other", BayesianLoraConfig(r=2, target_modules=["0"]))
    model.set_adapter("other")
    model.set_adapter("default")
    for _, layer in adapted_layers(model):
        assert not any(p.requires_grad for p in layer.gates_of("default").parameters())
        assert layer.bayesian_lora_up["default"].requires_grad


def test_leaving_the_fixed_phase_frees_the_gates(adapted) -> None:
    model = adapted()
    schedule = GateSchedule(model, 4, phases=(0.0, 0.0, 0.5))
    schedule.restore(3)
    schedule.restore(1)
    assert all(p.requires_grad for _, _, gates in learning_adapters(model) for p in gates.parameters())


def test_gates_are_kept_where_they_can_return(adapted) -> None:
    model = adapted()
    schedule = GateSchedule(model, 4)
    with torch.no_grad():
        for _, _, gates in learning_adapters(model):
            gates.bit_logits.fill_(-20.0)
            gates.rank_logits.fill_(20.0)
    schedule.step()
    for _, _, gates in learning_adapters(model):
        assert bool((gates.bit_logits == -4.0).all())
        assert bool((gates.rank_logits == 8.0).all())


def test_calibration_ends_with_the_warm_up(adapted, rows) -> None:
    model = adapted(calibration_passes=1000).train()
    schedule = GateSchedule(model, 8, phases=(0.5, 0.25, 0.25))
    for step in range(1, 5):
        model(rows)
        schedule.step()
        calibrated = {
            site: quantizer.is_calibrated
            for _, layer in adapted_layers(model)
            for site, quantizer in layer.bayesian_lora_quantizers["default"].items()
        }
        assert calibrated.pop("weight")
        assert set(calibrated.values()) == {step == 4}


def test_ranges_follow_growing_weights_only_in_the_warm_up(adapted, rows) -> None:
    model = adapted().train()
    for _ in range(3):
        model(rows)
    schedule = GateSchedule(model, 8, phases=(0.25, 0.25, 0.25))
    (_, layer), _ = adapted_layers(model)
    up, quantizer = layer.bayesian_lora_up["default"], layer.bayesian_lora_quantizers["default"]["up"]
    for step in range(1, 5):
        with torch.no_grad():
            up.mul_(2)
        before = quantizer.range_.item()
        schedule.step()
        expected = up.detach().abs().max().item() if step <= 2 else before
        assert quantizer.range_.item() == pytest.approx(expected, rel=1e-5)


def test_stepping_too_often_is_an_error_and_changes_nothing(adapted) -> None:
    schedule = GateSchedule(adapted(), 2)
    schedule.step()
    schedule.step()
    with pytest.raises(ScheduleError, match="made for 2 optimizer steps and is stepped once more"):
        schedule.step()
    assert schedule.completed_steps == 2


def test_all_wrong_numbers_are_reported_together(adapted) -> None:
    with pytest.raises(ScheduleError, match="GateSchedule") as failure:
        GateSchedule(adapted(), 0, lambda_q=-1.0, phases=(0.5, 0.5, 0.5))
    assert all(text in str(failure.value) for text in ("got 0", "got -1.0", "(0.5, 0.5, 0.5)"))


@pytest.mark.parametrize("settings", [None, {"learn_bits": False, "learn_rank": False}])
def test_a_model_with_nothing_to_schedule_is_refused(adapted, settings) -> None:
    model = nn.Linear(2, 2) if settings is None else adapted(**settings)
    with pytest.raises(ScheduleError, match="no active Bayesian-LoRA adapter with gates"):
        GateSchedule(model, 4)


def test_state_goes_through_a_checkpoint(adapted) -> None:
    schedule = GateSchedule(adapted(), 4)
    for _ in range(3):
        schedule.step()
    other = GateSchedule(adapted(), 4)
    other.load_state_dict(schedule.state_dict())
    assert other.phase() == schedule.phase()
    assert other.completed_steps == 3
    with pytest.raises(ScheduleError, match="made for 4 steps, this one for 5"):
        GateSchedule(adapted(), 5).load_state_dict(schedule.state_dict())
    with pytest.raises(ScheduleError, match=r"in \[0, 4\], got 5"):
        other.restore(5)


def test_the_steps_are_remembered_by_the_layers(adapted) -> None:
    model = adapted()
    schedule = GateSchedule(model, 4)
    schedule.step()
    schedule.step()
    assert [int(layer.bayesian_lora_steps["default"]) for _, layer in adapted_layers(model)] == [2, 2]
    assert any("bayesian_lora_steps" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("steps", "phases", "said"),
    [
        (10, (0.25, 0.25, 1.5), r"three shares >= 0 with a sum <= 1, got \(0.25, 0.25, 1.5\)"),
        (10, (float("nan"), 0.25, 0.25), r"three shares >= 0 with a sum <= 1, got \(nan"),
        (10, (0.5, 0.5), r"three shares >= 0 with a sum <= 1, got \(0.5, 0.5\)"),
        (2.5, (0.25, 0.25, 0.25), "total_steps must be a whole number >= 1, got 2.5"),
        (True, (0.25, 0.25, 0.25), "total_steps must be a whole number >= 1, got True"),
    ],
)
def test_phases_that_do_not_fit_the_run_are_refused(adapted, steps, phases, said) -> None:
    with pytest.raises(ScheduleError, match=said):
        GateSchedule(adapted(), steps, phases=phases)


@pytest.mark.parametrize(("name", "form"), [("lambda_q", "bits=4"), ("lambda_r", "rank=2")])
@torch.no_grad()
def test_a_lambda_that_closed_every_gate_is_named_once_with_the_budget_to_use(adapted, name, form) -> None:
    model = adapted()
    schedule = GateSchedule(model, 8, **{name: 0.5}, phases=(0.25, 0.25, 0.25))
    for _, _, gates in learning_adapters(model):
        gates.bit_logits.fill_(-3.0)
        gates.rank_logits.fill_(-3.0)
    for _ in range(5):
        schedule.step()
    with pytest.warns(RankbitsWarning, match=rf'{name}=\S+ has closed every gate.*budget="{form}"'):
        schedule.step()
    schedule.step()  # a second warning would be an error


@pytest.mark.parametrize("weighting", ["bop", "byte"])
@torch.no_grad()
def test_what_a_penalty_by_size_has_no_price_for_does_not_hide_that_all_else_was_closed(adapted, weighting) -> None:
    model = adapted()
    schedule = GateSchedule(model, 4, lambda_q=0.5, lambda_r=0.0, weighting=weighting)
    closed = 0
    for layer, name, gates in learning_adapters(model):
        sizes = layer.macs_per_row(name) if weighting == "bop" else layer.stored_numbers(name)
        assert 0 in sizes
        for row, size in enumerate(sizes):
            gates.bit_logits[row] = -3.0 if size else 6.0
            closed += size > 0
    assert closed > 2
    schedule.step()
    schedule.step()
    with pytest.warns(RankbitsWarning, match=r"lambda_q=\S+ has closed every gate"):
        schedule.step()


@torch.no_grad()
def test_one_open_gate_is_nothing_to_warn_about(adapted) -> None:
    model = adapted()
    schedule = GateSchedule(model, 4, lambda_q=0.5, lambda_r=0.5)
    first = next(gates for _, _, gates in learning_adapters(model))
    for _, _, gates in learning_adapters(model):
        gates.bit_logits.fill_(-3.0)
        gates.rank_logits.fill_(-3.0)
    first.bit_logits[0, 0] = first.rank_logits[0] = 3.0
    for _ in range(4):
        schedule.step()


@pytest.mark.parametrize(("key", "value"), [("weighting", "size"), ("reduction", "max")])
def test_an_unknown_penalty_is_refused(adapted, key, value) -> None:
    with pytest.raises(ScheduleError, match=f"{key}: given '{value}', expected one of"):
        GateSchedule(adapted(), 4, **{key: value})
