"""Which gates decide, and how near they are to falling to the other side."""

import pytest
import torch

from rankbits.gates.hard_concrete import THRESHOLD, is_open, open_probability
from rankbits.quant.grid import GATED_WIDTHS
from rankbits.records import certainty
from rankbits.records.certainty import marginals, rank_gates, width_gates


def test_the_constants_are_those_of_the_gates() -> None:
    assert pytest.approx(1 - THRESHOLD, abs=1e-15) == certainty.SAMPLED_THRESHOLD
    assert certainty.GATED_WIDTHS == GATED_WIDTHS


def test_a_sampled_gate_is_open_where_the_rule_of_inference_opens_it() -> None:
    logits = torch.linspace(-4, 4, 33)
    for probability, rule in zip(open_probability(logits).tolist(), is_open(logits).tolist(), strict=True):
        assert width_gates("weight", [probability])[0].is_open == rule


def test_marginals_are_products() -> None:
    assert marginals([0.5, 0.5, 0.2]) == pytest.approx([0.5, 0.25, 0.05])
    assert marginals([]) == []


def test_gates_behind_the_first_closed_one_decide_nothing() -> None:
    found = width_gates("up", [0.9, 0.7, 0.3, 0.99])
    assert [(gate.level, gate.is_open) for gate in found] == [(4, True), (8, True), (16, False)]


def test_straight_through_ranks_are_decided_by_the_product_that_is_rounded() -> None:
    found = rank_gates([0.9, 0.6, 0.9], "ste")
    assert [(gate.level, gate.is_open) for gate in found] == [(2, True), (3, True), (4, False)]
    assert [gate.probability for gate in found] == pytest.approx([0.9, 0.54, 0.486])
    assert {gate.threshold for gate in found} == {0.5}


def test_sampled_ranks_are_decided_one_by_one() -> None:
    found = rank_gates([0.9, 0.6, 0.9], "hard_concrete")
    assert [(gate.level, gate.probability, gate.is_open) for gate in found] == [(2, 0.9, True), (3, 0.6, False)]


def test_a_gate_is_near_its_threshold_on_either_side() -> None:
    near, far = width_gates("weight", [0.75, 0.77])
    assert (near.is_near, far.is_near) == (True, False)
    assert width_gates("weight", [0.57])[0].is_near
    assert near.margin == pytest.approx(0.09)


def test_a_gate_names_itself() -> None:
    assert width_gates("weight", [0.9, 0.69])[1].text == "weight at 8 bits, open with 0.69 (on above 0.66)"
    assert rank_gates([0.5], "ste")[0].text == "rank 2, open with 0.50 (on above 0.50)"
