"""Budgets: what is refused before training, how gates are closed, and that what matters keeps its bits."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rankbits import (
    BayesianLoraConfig,
    Budget,
    GateSchedule,
    harden,
    optimizer_and_scheduler,
    regularization_loss,
    summarize,
)
from rankbits.errors import RecipeError, ScheduleError
from rankbits.gates.hard_concrete import OPEN_LOGIT
from rankbits.training.budget import CLOSED, CONTESTED, REOPENED
from rankbits.tuners.bayesian_lora import learning_adapters

PHASES = (0.1, 0.4, 0.2)


@pytest.mark.parametrize(
    ("budget", "settings", "said"),
    [
        ("flops=1", {}, "given 'flops=1', expected one of bops, bytes, bits, rank"),
        (3.0, {}, "given 3.0, expected a text such as 'bits=4', or a rankbits.Budget"),
        (["bits=4", None], {}, "given None, expected a text such as 'bits=4'"),
        ([], {}, r"given \[\], expected a text such as 'bits=4'"),
        (["bits=4", "bits=5"], {}, "given bits=4 and bits=5; expected one of each quantity"),
        ("bits=1.5", {}, "bits=1.5 cannot be met: with 2 bits and rank 1 everywhere it is 2, with all gates open 32"),
        ("bits=40", {}, "bits=40 cannot be met"),
        ("rank=0.5", {}, "rank=0.5 cannot be met: .* it is 1, with all gates open 4"),
        ("bytes=0.01", {}, "bytes=0.01 cannot be met"),
        ("bops=0.01", {"placement": "merged", "quantizers": ["weight"]}, 'it is 0.25, .*add "input" to quantizers'),
        ("bits=4", {"learn_bits": False}, "bits=4: the model has no quantizers.*learn_bits=True"),
        ("rank=2", {"learn_rank": False}, "rank=2: the model has no rank gates.*learn_rank=True and r of at least 2"),
        (["bits=1", "rank=9"], {}, "bits=1 cannot be met.*; rank=9 cannot be met"),
        (
            ["bops=0.1", "bits=16"],
            {"placement": "merged"},
            r"bits=16 contradicts bops=0.1, which leaves it 10\.67",
        ),
        (
            ["bits=2.5", "bops=1.0"],
            {"placement": "merged"},
            r"bops=1 contradicts bits=2.5, which leaves it 0\.25",
        ),
    ],
)
def test_what_cannot_be_met_is_refused_before_training(adapted, budget, settings, said) -> None:
    model = adapted(**settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ScheduleError, match=said):
        GateSchedule(model, 40, budget=budget, phases=PHASES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_input_quantizer_makes_small_budgets_of_operations_possible(adapted) -> None:
    GateSchedule(adapted(placement="merged"), 40, budget="bops=0.02", phases=PHASES)


@pytest.mark.parametrize("phases", [(0.5, 0.0, 0.5), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)])
def test_a_budget_needs_steps_in_which_gates_can_close(adapted, phases) -> None:
    with pytest.raises(ScheduleError, match=r"budget bits=4: of 10 steps .* leaves none in which gates could close"):
        GateSchedule(adapted(), 10, budget="bits=4", allocation="descent", phases=phases)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantity": "flops", "limit": 1.0}, "quantity: given 'flops', expected one of bops, bytes, bits, rank"),
        ({"quantity": "bops", "limit": -1.0}, "limit: given -1.0, expected a number above 0"),
        ({"quantity": "bops", "limit": 1.0, "scope": "all"}, "scope: given 'all', expected one of adapted, model"),
        ({"quantity": "bops", "limit": 1.0, "scope": "model"}, "scope 'model' needs a sequence_length"),
        ({"quantity": "bits", "limit": 4, "scope": "model", "sequence_length": 8}, "counts bit operations, given with"),
        ({"quantity": "bops", "limit": 1.0, "sequence_length": 0}, "sequence_length: given 0"),
        ({"quantity": "bops", "limit": 1.0, "reference_bits": 8}, "16 or 32 bits wide, given 8"),
    ],
)
def test_a_budget_checks_what_it_is_given(settings, said) -> None:
    with pytest.raises(RecipeError, match=said):
        Budget(**settings)


@pytest.mark.parametrize(
    ("budget", "settings", "lambdas"),
    [
        (None, {}, (1e-3, 1e-3)),
        ("bits=4", {"placement": "merged"}, (0.0, 0.0)),
        ("bits=4", {}, (0.0, 0.0)),
        ("bytes=0.5", {}, (0.0, 0.0)),
        ("rank=2", {}, (0.0, 0.0)),
        (["bits=4", "rank=2"], {"placement": "merged"}, (0.0, 0.0)),
    ],
)
def test_under_a_budget_nothing_else_is_penalised_unless_asked_for(adapted, budget, settings, lambdas) -> None:
    schedule = GateSchedule(adapted(**settings), 40, budget=budget)
    assert (schedule.lambda_q, schedule.lambda_r) == lambdas


def test_a_lambda_beside_a_budget_of_the_same_gates_is_refused(adapted) -> None:
    with pytest.raises(ScheduleError, match=r"lambda_q: given 0.1 .* bits=4, which presses the same gates"):
        GateSchedule(adapted(placement="merged"), 40, budget="bits=4", lambda_q=0.1)
    with pytest.raises(ScheduleError, match="lambda_r: given 0 together with the budget rank=2"):
        GateSchedule(adapted(), 40, budget="rank=2", lambda_r=0.0)
    assert (
        GateSchedule(adapted(placement="merged"), 40, budget="bits=4", allocation="descent", lambda_r=0.5).lambda_r
        == 0.5
    )


def test_the_target_descends_from_the_cost_to_the_limit(adapted) -> None:
    schedule = GateSchedule(
        adapted(placement="merged", quantizers=["weight"]),
        110,
        budget="bits=4",
        allocation="descent",
        phases=(0.1, 0, 0),
    )
    targets = []
    for _ in range(110):
        schedule.step()
        targets.append(schedule.budgets()[0].target)
    descent = targets[10:]  # from the end of the warm-up, 11 steps; 99 remain, and it descends in 0.8 of them
    assert descent[0] == 32.0
    assert descent[20] == pytest.approx(8.0, rel=0.05)
    assert min(descent[80:]) == max(descent[80:]) == 4.0
    assert descent == sorted(descent, reverse=True)


@torch.no_grad()
def test_only_the_top_open_gate_is_pressed_and_made_to_contest(adapted) -> None:
    model = adapted(placement="merged", quantizers=["weight"])
    schedule = GateSchedule(model, 40, budget="bits=4", allocation="descent", phases=PHASES)
    for _ in range(6):
        schedule.step()
    for layer, name, gates in learning_adapters(model):
        assert gates.bit_logits.tolist() == [[6.0, 6.0, 6.0, CONTESTED]]
        widths, _ = layer.phase[name].pressure
        assert widths[0, :3].tolist() == [0.0, 0.0, 0.0]
        assert float(widths[0, 3]) > 0.0
    first, second = (gates for _, _, gates in learning_adapters(model))
    first.bit_logits[0, 3] = OPEN_LOGIT - 0.01
    schedule.step()
    assert first.bit_logits.tolist() == [[6.0, 6.0, CONTESTED, CLOSED]]
    first.bit_logits[0, 3] = OPEN_LOGIT + 0.01
    schedule.step()
    assert float(first.bit_logits[0, 3]) == pytest.approx(REOPENED)
    assert second.bit_logits.tolist() == [[6.0, 6.0, 6.0, CONTESTED]]


@torch.no_grad()
def test_nothing_is_pressed_while_the_target_is_met(adapted) -> None:
    model = adapted(placement="merged", quantizers=["weight"], initial_bit_logit=3.0)
    schedule = GateSchedule(model, 40, budget="bits=20", allocation="descent", phases=PHASES)
    for _, _, gates in learning_adapters(model):
        gates.bit_logits[:, 3] = -4.0
    for _ in range(8):
        schedule.step()
        assert not regularization_loss(model).requires_grad
        assert all(layer.phase[name].pressure is None for layer, name, _ in learning_adapters(model))
    mu = schedule.budgets()[0].mu
    schedule.step()
    assert schedule.budgets()[0].mu < mu


def test_two_bits_are_all_that_a_blind_run_is_left_with_at_the_tightest_budget(adapted) -> None:
    model = adapted(placement="merged")
    schedule = GateSchedule(model, 10, budget=["bits=2", "rank=1"], phases=PHASES)
    for _ in range(8):
        schedule.step()
    assert [state.cost for state in schedule.budgets()] == [2.0, 1.0]
    assert [(s.bits["weight"], s.rank) for s in summarize(model)] == [(2, 1), (2, 1)]


class Parallel(nn.Module):
    """Layers side by side whose outputs are added with known weights, so that their rounding matters as much."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weights = weights
        self.layers = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in weights)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, layers, 24] to [rows, 24]."""
        return sum(w * layer(x[:, i]) for i, (w, layer) in enumerate(zip(self.weights, self.layers, strict=True)))


SENSITIVE, INSENSITIVE = (0, 3), (1, 2)


def _trained(seed: int, budget: Any, steps: int = 160, **settings: Any) -> tuple[PeftModel, GateSchedule]:
    torch.manual_seed(seed)
    base, teacher = Parallel([3.0, 0.2, 0.2, 3.0]), Parallel([3.0, 0.2, 0.2, 3.0])
    teacher.load_state_dict(base.state_dict())
    chosen = {"r": 3, "placement": "merged", "quantizers": ["weight"], "calibration_passes": 4, "learn_rank": False}
    targets = [f"layers.{index}" for index in range(4)]
    model = get_peft_model(base, BayesianLoraConfig(**(chosen | settings), target_modules=targets)).train()
    schedule = GateSchedule(model, steps, budget=budget, allocation="descent", phases=PHASES)
    optimizer, scheduler = optimizer_and_scheduler(schedule, learning_rate=1e-3)
    for _ in range(steps):
        x = torch.randn(32, 4, 24)
        loss = (model(x) - teacher(x).detach() - 0.3 * torch.randn(32, 24)).pow(2).mean()
        optimizer.zero_grad()
        (loss + regularization_loss(model)).backward()
        optimizer.step()
        scheduler.step()
        schedule.step()
    return model, schedule


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_matters_keeps_more_bits_and_the_budget_is_met(seed: int) -> None:
    model, schedule = _trained(seed, "bits=3")
    bits = [summary.bits["weight"] for summary in summarize(model)]
    assert min(bits[i] for i in SENSITIVE) > max(bits[i] for i in INSENSITIVE)
    (state,) = schedule.budgets()
    smallest_open = min(width / 2 for width in bits if width > 2) / 4
    assert 3.0 - smallest_open < state.cost <= 3.0


def test_bit_operations_of_the_paper_s_layer_are_met() -> None:
    settings = {"placement": "separate", "quantizers": ["weight", "down", "diagonal", "up", "input", "diagonal_output"]}
    model, schedule = _trained(0, "bops=0.25", steps=60, learn_rank=True, init_weights=False, **settings)
    (state,) = schedule.budgets()
    assert 0.24 < state.cost <= 0.25
    assert {summary.bits["input"] for summary in summarize(model)} <= {2, 4, 8, 16}


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(adapted, rows) -> None:
    def start() -> tuple[PeftModel, GateSchedule, torch.optim.Optimizer]:
        model = adapted(placement="merged").train()
        schedule = GateSchedule(model, 40, budget=["bops=0.3", "rank=2"], phases=PHASES)
        return model, schedule, optimizer_and_scheduler(schedule, learning_rate=1e-3)[0]

    def advance(model: PeftModel, schedule: GateSchedule, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            torch.manual_seed(schedule.completed_steps)
            optimizer.zero_grad()
            (model(rows).pow(2).sum() + regularization_loss(model)).backward()
            optimizer.step()
            schedule.step()

    straight = start()
    advance(*straight, 40)
    first = start()
    advance(*first, 18)
    saved = [part.state_dict() for part in first]
    second = start()
    second[0].load_state_dict(saved[0])
    second[2].load_state_dict(saved[2])
    second[1].load_state_dict(saved[1])
    assert second[1].budgets() == first[1].budgets()
    advance(*second, 22)
    for name, value in second[0].state_dict().items():
        assert torch.equal(value, straight[0].state_dict()[name]), name


def test_a_checkpoint_of_another_budget_is_refused(adapted) -> None:
    state = GateSchedule(adapted(), 40, budget="bits=4").state_dict()
    with pytest.raises(ScheduleError, match=r"budgets are \['bits=4'\], those of this schedule \['bits=5'\]"):
        GateSchedule(adapted(), 40, budget="bits=5").load_state_dict(state)
    with pytest.raises(ScheduleError, match=r"budgets are \['bits=4'\], this schedule's none"):
        GateSchedule(adapted(), 40).load_state_dict(state)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (Budget("bops", 0.1, 32), Budget("bops", 0.1, 16), "bops=0.1 at 32 bits, adapted.*bops=0.1 at 16 bits"),
        (Budget("bops", 0.1, sequence_length=8), Budget("bops", 0.1), "adapted, 8 tokens.*adapted'"),
        (Budget("bytes", 0.3, 32), Budget("bytes", 0.3), "bytes=0.3 at 32 bits.*bytes=0.3 at 16 bits"),
    ],
)
def test_a_checkpoint_of_a_budget_that_is_counted_otherwise_is_refused(adapted, first, second, said) -> None:
    settings = {"placement": "merged", "quantizers": ["weight", "input"]}
    state = GateSchedule(adapted(**settings), 40, budget=first).state_dict()
    GateSchedule(adapted(**settings), 40, budget=first).load_state_dict(state)
    with pytest.raises(ScheduleError, match=said):
        GateSchedule(adapted(**settings), 40, budget=second).load_state_dict(state)


def test_a_checkpoint_from_before_they_were_kept_is_of_the_same_phases_and_reference(adapted) -> None:
    settings = {"placement": "merged", "quantizers": ["weight", "input"]}
    state = GateSchedule(adapted(**settings), 40, budget="bops=0.1").state_dict()
    state["budget"]["budgets"] = ["bops=0.1"]
    del state["phases"], state["allocation"]
    GateSchedule(adapted(**settings), 40, budget="bops=0.1").load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": "bits=4", "phases": (0.5, 0.2, 0.2)}, r"\[0.25, 0.25, 0.25\].*this one .*\[0.5, 0.2, 0.2\]"),
        ({"budget": "bits=4", "allocation": "descent"}, "evidence.*this one .*descent"),
    ],
)
def test_a_checkpoint_of_other_phases_is_refused(adapted, settings, said) -> None:
    state = GateSchedule(adapted(), 40, budget="bits=4").state_dict()
    with pytest.raises(ScheduleError, match=said):
        GateSchedule(adapted(), 40, **settings).load_state_dict(state)


@pytest.mark.parametrize(("allocation", "chosen_at"), [("evidence", 10), ("descent", 30)])
def test_going_on_behind_the_step_that_chooses_needs_gates_that_were_chosen(adapted, allocation, chosen_at) -> None:
    def start() -> GateSchedule:
        return GateSchedule(adapted(), 40, budget="bits=4", allocation=allocation)

    start().restore(chosen_at - 1)
    schedule = start()
    for completed in (chosen_at, 40):
        with pytest.raises(ScheduleError, match=rf"bits=4: after {completed} steps the gates cost 32.* {chosen_at}: "):
            schedule.restore(completed)
        assert schedule.completed_steps == 0
    with torch.no_grad():
        for _, _, gates in learning_adapters(schedule.model):
            gates.bit_logits.fill_(-4.0)
    schedule.restore(40)


@pytest.mark.parametrize("allocation", ["evidence", "descent"])
def test_what_it_ended_at_can_be_asked_of_a_hardened_model(adapted, rows, allocation) -> None:
    model = adapted().train()
    schedule = GateSchedule(model, 12, budget="bits=4", allocation=allocation)
    for _ in range(12):
        model(rows).sum().backward()
        schedule.step()
    (before,) = schedule.budgets()
    assert before.cost <= 4.0
    harden(model)
    (after,) = schedule.budgets()
    assert (after.cost, after.target, after.mu) == (before.cost, before.target, before.mu)


def test_evidence_has_nothing_to_choose_by_without_a_budget(adapted) -> None:
    with pytest.raises(ScheduleError, match="allocation: given 'evidence' without a budget"):
        GateSchedule(adapted(), 40, allocation="evidence")
