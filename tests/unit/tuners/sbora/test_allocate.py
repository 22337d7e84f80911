"""Shares of rows and columns: disjoint, uniform, reproducible, the same whether given at once or one by one."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankbits.tuners.sbora.allocate import allocate, random_order


@st.composite
def tasks(draw: st.DrawFn) -> tuple[dict[str, int], int]:
    ranks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    size = draw(st.integers(sum(ranks), sum(ranks) + 40))
    return {f"task {number}": rank for number, rank in enumerate(ranks)}, size


@given(tasks(), st.integers(0, 2**63), st.text(max_size=20))
def test_shares_are_disjoint_and_complete(work: tuple[dict[str, int], int], seed: int, layer: str) -> None:
    ranks, size = work
    shares = allocate(ranks, size, seed=seed, layer=layer)
    assert {task: len(share) for task, share in shares.items()} == ranks
    together = [index for share in shares.values() for index in share]
    assert len(set(together)) == len(together)
    assert set(together) <= set(range(size))
    assert together == random_order(size, seed=seed, layer=layer)[: len(together)]


@given(tasks(), st.integers(0, 1000))
def test_one_by_one_gives_the_same_as_at_once(work: tuple[dict[str, int], int], seed: int) -> None:
    ranks, size = work
    at_once = allocate(ranks, size, seed=seed, layer="l")
    taken: list[int] = []
    place = 0
    for task, rank in ranks.items():
        beside_others = allocate({task: rank}, size, seed=seed, layer="l", taken=taken)
        apart = allocate({task: rank}, size, seed=seed, layer="l", first=place)
        assert beside_others[task] == apart[task] == at_once[task]
        taken += beside_others[task]
        place += rank


@given(tasks(), st.data())
def test_what_a_deleted_task_had_is_given_again_and_nothing_else_is_touched(
    work: tuple[dict[str, int], int], data: st.DataObject
) -> None:
    ranks, size = work
    shares = allocate(ranks, size, seed=1, layer="l")
    gone = data.draw(st.sampled_from(sorted(ranks)))
    kept = [index for task, share in shares.items() if task != gone for index in share]
    again = allocate({"new": ranks[gone]}, size, seed=1, layer="l", taken=kept)
    assert again["new"] == shares[gone]


@given(st.integers(1, 60), st.integers(0, 100))
def test_the_order_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(random_order(size, seed=seed, layer="l")) == list(range(size))


def test_every_index_is_equally_likely() -> None:
    """3,000 draws of 3 of 12: each index is expected 750 times, with a standard deviation of 23.7."""
    counts = Counter(i for seed in range(3000) for i in allocate({"t": 3}, 12, seed=seed, layer="l")["t"])
    assert set(counts) == set(range(12))
    assert max(abs(count - 750) for count in counts.values()) < 4 * 23.7


def test_independent_draws_overlap_as_often_as_expected() -> None:
    """Two independent draws of r of n share r^2 / n indices on average: here 64 / 64 = 1.0, standard error 0.03."""
    overlaps = []
    for seed in range(1000):
        a, b = (set(allocate({"t": 8}, 64, seed=s, layer="l")["t"]) for s in (seed, 10_000 + seed))
        overlaps.append(len(a & b))
    assert abs(sum(overlaps) / 1000 - 1.0) < 0.1


def test_layers_and_seeds_choose_apart_and_the_global_random_state_plays_no_part() -> None:
    state = torch.get_rng_state()
    orders = [random_order(50, seed=seed, layer=layer) for seed in (0, 1, 2**63) for layer in ("a", "b")]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(order) for order in orders}) == 6
    torch.manual_seed(99)
    assert random_order(50, seed=0, layer="a") == orders[0]


def test_another_process_chooses_the_same() -> None:
    code = "from rankbits.tuners.sbora.allocate import random_order; print(random_order(9, seed=3, layer='h.0.q'))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == str(random_order(9, seed=3, layer="h.0.q"))


@pytest.mark.parametrize("rank", [0, -1, 13])
def test_a_rank_that_no_such_matrix_can_have_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"`r`={rank} of 't' does not fit 'h\.0\.q', which has 12 .*1 <= r <= 12"):
        allocate({"t": rank}, 12, seed=0, layer="h.0.q")


def test_a_task_that_does_not_fit_says_where_how_many_are_left_and_how_many_were_asked() -> None:
    with pytest.raises(ValueError, match=r"'c' asks for r=5 .* of 'h\.0\.q', of which 4 are left: of 12, 8"):
        allocate({"a": 4, "b": 4, "c": 5}, 12, seed=0, layer="h.0.q")
    with pytest.raises(ValueError, match=r"of which 2 are left: of 12, 0 .* from place 10"):
        allocate({"a": 3}, 12, seed=0, layer="h.0.q", first=10)
