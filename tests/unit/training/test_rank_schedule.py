"""DyLoRA's rank is drawn once per optimizer step, the same everywhere, and a resumed run draws what it would have."""

from collections import Counter

import pytest
import torch
from peft import get_peft_model
from torch import nn

from rankbits import DyloraConfig, DyloraSchedule, set_rank
from rankbits.errors import ScheduleError
from rankbits.training.rank_schedule import drawn_rank
from rankbits.tuners.dylora import adapted_layers


def _model(seed: int = 0, **settings) -> nn.Module:
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    return get_peft_model(base, DyloraConfig(r=4, target_modules=["0", "2"], init_weights=False, **settings)).train()


def test_ranks_are_those_of_the_seed_for_ever() -> None:
    # Written down once: `drawn_rank` on CPython 3.11. They may never change, or runs could not be resumed.
    assert [drawn_rank(0, step, 8) for step in range(12)] == [3, 7, 7, 6, 5, 4, 3, 8, 8, 8, 4, 4]


def test_ranks_are_uniform_and_of_all_steps_independent() -> None:
    counts = Counter(drawn_rank(3, step, 8) for step in range(8000))
    assert sorted(counts) == list(range(1, 9))
    # The 99.99 % point of chi squared with 7 degrees of freedom.
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 29.9
    pairs = Counter((drawn_rank(3, step, 2), drawn_rank(3, step + 1, 2)) for step in range(4000))
    assert all(abs(count - 1000) < 120 for count in pairs.values())


def test_all_layers_and_all_micro_batches_of_a_step_have_one_rank() -> None:
    model = _model()
    schedule = DyloraSchedule(model, seed=7)
    layers = [layer for _, layer in adapted_layers(model)]
    for step in range(6):
        expected = drawn_rank(7, step, 4)
        for _ in range(3):
            model(torch.randn(2, 6)).sum().backward()
            assert [layer.rank_in_use("default") for layer in layers] == [expected, expected]
        assert schedule.ranks() == {"default": expected}
        schedule.step()
    assert schedule.completed_steps == 6


def _run(model: nn.Module, schedule: DyloraSchedule, optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def test_a_resumed_run_equals_one_that_was_not_cut() -> None:
    def start() -> tuple:
        model = _model()
        return model, DyloraSchedule(model, seed=2), torch.optim.AdamW(model.parameters(), lr=0.05)

    whole, schedule, optimizer = start()
    _run(whole, schedule, optimizer, range(8))
    first, schedule, optimizer = start()
    _run(first, schedule, optimizer, range(5))
    saved = {"model": first.state_dict(), "schedule": schedule.state_dict(), "optimizer": optimizer.state_dict()}
    second = _model(seed=9)
    second.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW(second.parameters(), lr=0.05)
    optimizer.load_state_dict(saved["optimizer"])
    schedule = DyloraSchedule(second)
    schedule.load_state_dict(saved["schedule"])
    _run(second, schedule, optimizer, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_training_makes_small_ranks_good_where_plain_lora_does_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    target = x @ torch.randn(6, 4)

    def trained(scheduled: bool) -> float:
        torch.manual_seed(1)
        base = nn.Sequential(nn.Linear(6, 4))
        model = get_peft_model(base, DyloraConfig(r=4, target_modules=["0"], train_mode="prefix")).train()
        schedule = DyloraSchedule(model) if scheduled else None
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(300):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
        set_rank(model, 1)
        return float((model.eval()(x) - target).square().mean().detach())

    with pytest.warns(UserWarning, match="plain LoRA"):
        plain = trained(scheduled=False)
    assert trained(scheduled=True) < 0.7 * plain


def test_finishing_leaves_the_drawn_rank() -> None:
    model = _model()
    schedule = DyloraSchedule(model)
    schedule.finish()
    assert schedule.ranks() == {}
    assert all(layer.rank_in_use("default") == 4 for _, layer in adapted_layers(model))


def test_an_adapter_that_was_switched_off_draws_no_more() -> None:
    model = _model()
    model.add_adapter("other", DyloraConfig(r=2, target_modules=["0"]))
    schedule = DyloraSchedule(model)
    assert set(schedule.ranks()) == {"default"}
    model.set_adapter("other")
    schedule.step()
    assert schedule.ranks() == {"other": drawn_rank(0, 1, 2)}


def test_a_model_without_ranks_to_draw_is_refused() -> None:
    with pytest.raises(ScheduleError, match="Linear has no active DyLoRA adapter"):
        DyloraSchedule(nn.Linear(2, 2))
    with pytest.raises(ScheduleError, match="completed_steps must be >= 0, got -1"):
        DyloraSchedule(_model()).restore(-1)


PROGRAM = """
import sys
import torch
from peft import get_peft_model
from torch import nn
from rankbits import DyloraConfig, DyloraSchedule

rank, store, mode = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
config = DyloraConfig(r=4, target_modules=["0", "2"], init_weights=False, train_mode=mode)
model = nn.parallel.DistributedDataParallel(get_peft_model(base, config).train())
schedule = DyloraSchedule(model, seed=4)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
ranks = []
for step in range(6):
    torch.manual_seed(10 * step + rank)
    for _ in range(2):
        model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    ranks.append(schedule.ranks()["default"])
    schedule.step()
torch.distributed.destroy_process_group()
print(ranks, [p.double().sum().item().hex() for p in model.parameters()])
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frozen", "prefix"])
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs PyTorch's gloo backend")
def test_processes_that_train_together_draw_the_same_and_stay_equal(two_processes, mode) -> None:
    first, second = two_processes(PROGRAM, mode)
    assert first == second
    assert str([drawn_rank(4, step, 4) for step in range(6)]) in first
