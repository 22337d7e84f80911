"""Gates of a layer: nested, all open at the start, never without a rank."""

import pytest
import torch

from rankbits.tuners.bayesian_lora.config import RankGate
from rankbits.tuners.bayesian_lora.layer_gates import LayerGates

KINDS = list(RankGate)


def _gates(kind: RankGate, *, sites: int = 3, rank: int | None = 8, logit: float = 6.0) -> LayerGates:
    return LayerGates(sites, rank, kind, initial_bit_logit=logit, initial_rank_logit=logit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 8])
def test_all_ranks_and_widths_are_open_at_the_start(kind, rank) -> None:
    values = _gates(kind, rank=rank).values(hard=True)
    assert values.hard
    assert values.ranks.tolist() == [1.0] * rank
    assert values.widths.tolist() == [[True] * 4] * 3


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rank_gates_are_nested_and_the_first_is_always_one(kind, hard) -> None:
    torch.manual_seed(0)
    gates = _gates(kind)
    for _ in range(50):
        with torch.no_grad():
            gates.rank_logits.normal_(std=4.0)
        ranks = gates.values(hard=hard).ranks.detach()
        assert ranks.shape == (8,)
        assert float(ranks[0]) == 1.0
        assert bool((ranks[1:] <= ranks[:-1]).all())
        if hard or kind is RankGate.STRAIGHT_THROUGH:
            assert set(ranks.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_closed_logits_leave_rank_one_and_two_bits(kind) -> None:
    gates = _gates(kind, logit=-50.0)
    for hard in (False, True):
        assert gates.values(hard=hard).ranks.tolist() == [1.0] + [0.0] * 7
    assert not gates.values(hard=True).widths.any()


@pytest.mark.parametrize("kind", KINDS)
def test_penalty_alone_leads_to_rank_one_and_never_to_zero(kind) -> None:
    torch.manual_seed(0)
    gates = _gates(kind)
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.05)
    seen = set()
    for _ in range(300):
        optimizer.zero_grad()
        (gates.rank_probabilities().sum() + gates.width_probabilities().sum()).backward()
        optimizer.step()
        seen.add(int(gates.values(hard=True).ranks.sum()))
    assert min(seen) == 1
    assert max(seen) == 8
    assert not gates.values(hard=True).widths.any()


def test_a_straight_through_rank_at_exactly_one_half_is_closed() -> None:
    gates = _gates(RankGate.STRAIGHT_THROUGH, rank=3)
    with torch.no_grad():
        gates.rank_logits.copy_(torch.tensor([0.0, 9.0]))
    assert gates.values(hard=True).ranks.tolist() == [1.0, 0.0, 0.0]


def test_straight_through_ranks_draw_no_noise() -> None:
    gates = _gates(RankGate.STRAIGHT_THROUGH, sites=0)
    state = torch.get_rng_state()
    gates.values(hard=False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_products_of_those_of_single_gates(kind) -> None:
    gates = _gates(kind, sites=1, rank=3)
    with torch.no_grad():
        gates.bit_logits.copy_(torch.tensor([[2.0, -1.0, 0.5, 3.0]]))
        gates.rank_logits.copy_(torch.tensor([1.0, -2.0]))
    shift = 1.598597
    single = [1 / (1 + 2.718281828459045 ** -(logit + shift)) for logit in (2.0, -1.0, 0.5, 3.0)]
    expected = [single[0], single[0] * single[1], single[0] * single[1] * single[2]]
    assert gates.width_probabilities()[0, :3].tolist() == pytest.approx(expected, rel=1e-5)
    shift = 0.0 if kind is RankGate.STRAIGHT_THROUGH else shift
    first, second = (1 / (1 + 2.718281828459045 ** -(logit + shift)) for logit in (1.0, -2.0))
    assert gates.rank_probabilities().tolist() == pytest.approx([first, first * second], rel=1e-5)


def test_what_is_not_learned_has_no_gates() -> None:
    gates = _gates(RankGate.HARD_CONCRETE, sites=0, rank=None)
    assert list(gates.parameters()) == []
    assert gates.width_probabilities() is None
    assert gates.rank_probabilities() is None
    assert gates.values(hard=False).ranks is None
    assert gates.values(hard=False).widths.shape == (0, 4)


def test_clamp_keeps_all_logits_in_bounds() -> None:
    gates = _gates(RankGate.STRAIGHT_THROUGH)
    with torch.no_grad():
        gates.bit_logits.fill_(-9.0)
        gates.rank_logits.fill_(20.0)
    gates.clamp(-4.0, 8.0)
    assert bool((gates.bit_logits == -4.0).all())
    assert bool((gates.rank_logits == 8.0).all())


def test_gates_keep_float32_when_the_model_is_cast() -> None:
    gates = _gates(RankGate.STRAIGHT_THROUGH)
    for dtype in (torch.bfloat16, torch.float64):
        gates.to(dtype)
        assert {p.dtype for p in gates.parameters()} == {torch.float32}


def test_a_share_of_the_quantizers_is_sampled_and_the_others_stand_as_at_inference() -> None:
    gates = LayerGates(
        400, None, RankGate.STRAIGHT_THROUGH, initial_bit_logit=0.0, initial_rank_logit=6.0, sampled_share=0.25
    )
    with torch.no_grad():
        gates.bit_logits[:, 2:] = -2.0
    widths = gates.values(hard=False).widths
    standing = (widths == torch.tensor([1.0, 1.0, 0.0, 0.0])).all(dim=1)
    assert 0.65 < standing.float().mean().item() < 0.85


def test_the_mean_gradient_of_a_sampled_share_is_that_of_sampling_all() -> None:
    def mean_gradient(share: float) -> float:
        torch.manual_seed(0)
        gates = LayerGates(
            40_000, None, RankGate.STRAIGHT_THROUGH, initial_bit_logit=0.5, initial_rank_logit=6.0, sampled_share=share
        )
        gates.values(hard=False).widths.sum().backward()
        return gates.bit_logits.grad.mean().item()

    assert mean_gradient(0.2) == pytest.approx(mean_gradient(1.0), rel=0.05)


def test_whether_anything_is_rounded_is_no_question_to_the_device_in_a_pass() -> None:
    gates = _gates(RankGate.HARD_CONCRETE)
    gates.stand(stands=True, measures=False)

    def rounds(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if gates.rounds else x

    x = torch.zeros(2)
    assert torch.equal(torch.compile(rounds, backend="eager", fullgraph=True)(x), x)
    gates.load_state_dict({**gates.state_dict(), "bit_logits": torch.full((3, 4), -4.0)})
    assert gates.rounds
    gates.load_state_dict({**gates.state_dict(), "bit_logits": torch.full((3, 4), 4.0)})
    assert not gates.rounds
    gates.stand(stands=True, measures=True)
    assert gates.rounds
