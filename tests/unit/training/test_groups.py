"""Optimizer groups: each trainable parameter once, gates and ranges at constant rates and never decayed."""

import pytest
import torch
from torch import nn

from rankbits import GateSchedule, optimizer_and_scheduler
from rankbits.training.groups import Decay, GateRates, automatic_gate_rate, decay_factor
from rankbits.tuners.bayesian_lora import learning_adapters

OPEN_LOGIT = -0.935303


def _named_groups(optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    return {group["name"]: group for group in optimizer.param_groups}


def test_every_trainable_parameter_is_in_exactly_one_group(adapted) -> None:
    model = adapted()
    model.add_module("head", nn.Linear(6, 2))
    optimizer, _ = optimizer_and_scheduler(GateSchedule(model, 10), learning_rate=1e-3)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trainable)
    named = _named_groups(optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in named["gates"]["params"]} == {"bit_logits", "rank_logits"}
    for group, of_weights in (("ranges", False), ("weight_ranges", True)):
        found = [names[id(p)] for p in named[group]["params"]]
        assert found
        assert all(name.endswith("log_range") and (".weight.log_range" in name) == of_weights for name in found)
    assert {p.ndim for p in named["matrices"]["params"]} == {2}
    assert {p.ndim for p in named["vectors"]["params"]} == {1}


def test_only_matrices_decay_and_only_the_task_rate_falls(adapted) -> None:
    optimizer, scheduler = optimizer_and_scheduler(
        GateSchedule(adapted(), 10),
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup_steps=2,
        rates=GateRates(gates=0.05, ranges=0.002, eps=1e-4),
    )
    groups = _named_groups(optimizer)
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "matrices": 0.1,
        "vectors": 0.0,
        "gates": 0.0,
        "ranges": 0.0,
        "weight_ranges": 0.0,
    }
    assert groups["gates"]["eps"] == 1e-4
    rates = {name: [] for name in groups}
    for _ in range(10):
        for name, group in groups.items():
            rates[name].append(group["lr"])
        optimizer.step()
        scheduler.step()
    expected = [1e-3 * share for share in (0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8)]
    assert rates["matrices"] == pytest.approx(expected)
    assert rates["vectors"] == pytest.approx(expected)
    assert rates["gates"] == [0.05] * 10
    assert rates["ranges"] == [0.002] * 10
    # Gates are fixed in the last two of ten steps.
    assert rates["weight_ranges"] == pytest.approx([0.002] * 9 + [0.001])


def test_ranges_that_are_fitted_settle_when_gates_are_fixed(adapted) -> None:
    model = adapted(activation_ranges="fitted", quantizers=["weight", "input"])
    optimizer, scheduler = optimizer_and_scheduler(
        GateSchedule(model, 10), learning_rate=1e-3, rates=GateRates(ranges=0.002)
    )
    group = _named_groups(optimizer)["fitted_ranges"]
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in group["params"]} == {"input"}
    assert "ranges" not in _named_groups(optimizer)
    rates = []
    for _ in range(10):
        rates.append(group["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.002] * 9 + [0.001])


def test_the_automatic_rate_just_closes_a_gate(adapted) -> None:
    schedule = GateSchedule(adapted(), 100, phases=(0.25, 0.25, 0.25))
    optimizer, _ = optimizer_and_scheduler(schedule, learning_rate=1e-3)
    assert _named_groups(optimizer)["gates"]["lr"] == pytest.approx((6.0 - OPEN_LOGIT) / 50, rel=1e-5)
    assert automatic_gate_rate(2.0, 0) == pytest.approx(2.0 - OPEN_LOGIT, rel=1e-5)


def test_a_model_that_learns_only_ranks_has_no_group_of_ranges(adapted) -> None:
    model = adapted(learn_bits=False)
    optimizer, scheduler = optimizer_and_scheduler(GateSchedule(model, 10), learning_rate=1e-3)
    assert set(_named_groups(optimizer)) == {"matrices", "vectors", "gates"}
    optimizer.step()
    scheduler.step()


@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        (Decay.LINEAR, [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]),
        (Decay.COSINE, [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]),
        (Decay.CONSTANT, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_decay_factors(decay, factors) -> None:
    steps = (0, 1, 2, 6, 10, 11)
    values = [decay_factor(step, total_steps=10, warmup_steps=2, decay=decay) for step in steps]
    assert values == pytest.approx(factors, abs=1e-9)


def test_cosine_is_not_linear() -> None:
    early = decay_factor(4, total_steps=10, warmup_steps=2, decay=Decay.COSINE)
    assert early == pytest.approx(0.5 * (1 + 0.5**0.5))


def test_an_unknown_decay_is_refused(adapted) -> None:
    with pytest.raises(ValueError, match="polynomial"):
        optimizer_and_scheduler(GateSchedule(adapted(), 10), learning_rate=1e-3, decay="polynomial")


@pytest.mark.filterwarnings("ignore:.* has closed every gate")
def test_gates_keep_their_bounds_under_their_own_rate(adapted, rows) -> None:
    model = adapted().train()
    schedule = GateSchedule(model, 20, lambda_q=1.0, lambda_r=1.0, phases=(0.0, 0.0, 0.25))
    optimizer, scheduler = optimizer_and_scheduler(schedule, learning_rate=1e-3, rates=GateRates(gates=5.0))
    for _ in range(20):
        optimizer.zero_grad()
        model(rows).pow(2).sum().backward()
        optimizer.step()
        scheduler.step()
        schedule.step()
    logits = torch.cat([p.detach().flatten() for _, _, g in learning_adapters(model) for p in g.parameters()])
    assert float(logits.min()) >= -4.0
    assert float(logits.max()) <= 8.0


def test_under_a_budget_gates_are_fast_enough_to_close_one_after_another(adapted) -> None:
    schedule = GateSchedule(adapted(), 100, budget="bits=8", allocation="descent", phases=(0.25, 0.25, 0.25))
    optimizer, _ = optimizer_and_scheduler(schedule, learning_rate=1e-3)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["gates"] == pytest.approx(6 * (1.5 - OPEN_LOGIT) / 50)
    assert rates["rank_gates"] == pytest.approx((6.0 - OPEN_LOGIT) / 50)
    both = GateSchedule(adapted(), 100, budget=["bits=8", "rank=2"], phases=(0.25, 0.25, 0.25))
    assert "rank_gates" not in {
        group["name"] for group in optimizer_and_scheduler(both, learning_rate=1e-3)[0].param_groups
    }
