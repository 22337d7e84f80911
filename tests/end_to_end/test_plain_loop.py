"""The same learning by hand: a plain PyTorch loop with the public functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rankbits import (
    BayesianLoraConfig,
    GateSchedule,
    harden,
    optimizer_and_scheduler,
    regularization_loss,
    summarize,
)
from rankbits.errors import RankbitsWarning
from rankbits.training.groups import GateRates
from rankbits.tuners.bayesian_lora import learning_adapters

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def _model(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16, bias=False))
    chosen = {"r": 6, "alpha": 6.0, "target_modules": ["0"], "calibration_passes": 5}
    return get_peft_model(base, BayesianLoraConfig(**(chosen | settings)))


def _task() -> tuple[Tensor, Tensor]:
    """Inputs, and outputs of the model's own base plus an update of rank 2."""
    base = _model().get_base_model()[0].get_base_layer().weight.detach()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(256, 16, generator=generator)
    update = torch.randn(16, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    return x, x @ (base + update).T


def _run(model: PeftModel, steps: int, *, lambda_q: float = 0.0, lambda_r: float = 0.0, rate: float = 0.1) -> float:
    """Train, and return the mean squared error with the gates of inference."""
    torch.manual_seed(1)
    x, y = _task()
    schedule = GateSchedule(model, steps, lambda_q=lambda_q, lambda_r=lambda_r)
    optimizer, scheduler = optimizer_and_scheduler(
        schedule, learning_rate=0.02, rates=GateRates(gates=rate, ranges=0.01)
    )
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (nn.functional.mse_loss(model(x), y) + regularization_loss(model)).backward()
        optimizer.step()
        scheduler.step()
        schedule.step()
    with torch.no_grad():
        return nn.functional.mse_loss(model.eval()(x), y).item()


def test_the_rank_of_the_task_is_found() -> None:
    model = _model(learn_bits=False)
    start = nn.functional.mse_loss(model(_task()[0]), _task()[1]).item()
    error = _run(model, 300, lambda_r=1.0)
    (entry,) = summarize(model)
    assert 2 <= entry.rank < 6
    assert error < 0.01 * start


def test_without_penalty_bits_and_ranks_that_the_task_needs_stay() -> None:
    model = _model(quantizers=["weight", "output"])
    _run(model, 200)
    (entry,) = summarize(model)
    assert entry.rank == 6
    assert min(entry.bits.values()) >= 8


def test_a_strong_penalty_lowers_bits_and_the_result_can_be_hardened() -> None:
    model = _model()
    with pytest.warns(RankbitsWarning, match=r"lambda_r=\S+ has closed every gate"):
        _run(model, 200, lambda_q=50.0, lambda_r=50.0, rate=0.5)
    (entry,) = summarize(model)
    assert entry.rank == 1
    assert max(entry.bits.values()) <= 4
    assert entry.bits["up"] == 2
    x, _ = _task()
    expected = model(x)
    torch.testing.assert_close(harden(model)(x), expected, rtol=1e-4, atol=1e-5)


def _gate_gradients(micro_batches: int) -> list[Tensor]:
    model = _model(learn_bits=False, init_weights=False)
    GateSchedule(model, 4, lambda_r=0.7, phases=(0.0, 0.0, 0.0))
    x, y = _task()
    for part, target in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
        loss = nn.functional.mse_loss(model(part), target) + regularization_loss(model)
        (loss / micro_batches).backward()
    return [p.grad for _, _, gates in learning_adapters(model) for p in gates.parameters()]


def test_accumulation_divides_the_penalty_with_the_loss() -> None:
    for whole, parts in zip(_gate_gradients(1), _gate_gradients(8), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_a_loop_continues_from_its_checkpoint_as_if_never_stopped(tmp_path) -> None:
    x, y = _task()

    def parts() -> tuple[Any, ...]:
        model = _model().train()
        schedule = GateSchedule(model, 16, lambda_q=1.0, lambda_r=1.0)
        return model, schedule, *optimizer_and_scheduler(schedule, learning_rate=0.01, rates=GateRates(gates=0.5))

    def advance(model: PeftModel, schedule: GateSchedule, optimizer: Any, scheduler: Any, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y) + regularization_loss(model)
            loss.backward()
            optimizer.step()
            scheduler.step()
            schedule.step()
            losses.append(loss.item())
        return losses

    whole = parts()
    advance(*whole, 9)
    torch.save([part.state_dict() for part in whole] + [torch.get_rng_state()], tmp_path / "checkpoint.pt")
    expected = advance(*whole, 7)

    *states, noise = torch.load(tmp_path / "checkpoint.pt")
    again = parts()
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(noise)
    assert advance(*again, 7) == expected
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(again[0].state_dict()[name], tensor), name
