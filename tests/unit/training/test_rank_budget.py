"""AdaLoRA's budget is the closed cubic, and settings that leave it no step to fall in are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from rankbits.errors import ScheduleError
from rankbits.training.rank_budget import RankBudget


def test_the_budget_is_the_cubic_between_its_two_flat_ends() -> None:
    budget = RankBudget(144, 96, total_steps=20, warmup_steps=4, final_steps=6, interval=3)
    # By hand: 96 + 48 (1 - k/10)^3 for k = 1 .. 9, cut to whole numbers.
    falling = [130, 120, 112, 106, 102, 99, 97, 96, 96]
    assert [budget.kept(step) for step in range(21)] == [144] * 5 + falling + [96] * 7
    assert [step for step in range(21) if budget.masks(step)] == [6, 9, 12, *range(14, 21)]


sizes = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 12), st.integers(0, 12), st.integers(1, 80))


@given(sizes, st.integers(1, 9))
def test_the_budget_never_rises_and_ends_at_its_target(drawn: tuple[int, ...], interval: int) -> None:
    target, more, falling, warmup, final = drawn
    budget = RankBudget(target + more, target, falling + warmup + final, warmup, final, interval)
    curve = [budget.kept(step) for step in range(budget.total_steps + 1)]
    assert curve == sorted(curve, reverse=True)
    assert curve[0] == target + more
    assert curve[-1] == target
    assert budget.masks(budget.total_steps)


def test_the_budget_is_that_of_peft() -> None:
    config = AdaLoraConfig(init_r=12, target_r=7, total_step=83, tinit=9, tfinal=21, deltaT=5)
    theirs = RankAllocator(nn.Module(), config, "default")
    theirs.init_bgt, theirs.target_bgt = 12 * 6, 7 * 6
    ours = RankBudget(12 * 6, 7 * 6, total_steps=83, warmup_steps=9, final_steps=21, interval=5)
    for step in range(1, 84):
        kept, masks = theirs.budget_schedule(step)
        assert ours.kept(step) == kept
        # The one step at which PEFT's model, and not its allocator, orders a mask.
        assert ours.masks(step) == (masks or step == 83 - 21)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial": 8, "target": 9}, "asks for 9 ranks in all where the adapter starts with 8"),
        ({"warmup_steps": 5, "final_steps": 5}, "tinit 5 [+] tfinal 5 must be below the 10 optimizer steps"),
        ({"interval": 0}, "deltaT of at least 1, got target 4, tinit 0, tfinal 0, deltaT 0"),
        ({"warmup_steps": -1}, "got target 4, tinit -1"),
        ({"total_steps": 0}, "must be below the 0 optimizer steps"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        RankBudget(**({"initial": 8, "target": 4, "total_steps": 10} | settings))
