"""What a layer is said to have learned is what its gates of inference are."""

import pytest
import torch

from rankbits import harden, summarize
from rankbits.gates.hard_concrete import SHIFT
from rankbits.tuners.bayesian_lora import LayerSummary, adapted_layers


def test_ranks_and_widths_follow_the_gates_in_either_mode(mlp, rows, adapt) -> None:
    model = adapt(mlp, r=4, target_modules=["2"], quantizers=["up", "input"])
    ((_, layer),) = adapted_layers(model)
    gates = layer.gates_of("default")
    with torch.no_grad():
        gates.bit_logits.copy_(torch.tensor([[9.0, 9.0, -9.0, 9.0], [-9.0, 9.0, 9.0, 9.0]]))
        gates.rank_logits.copy_(torch.tensor([20.0, 0.1, 20.0]))
    (entry,) = summarize(model)
    p = torch.sigmoid(torch.tensor(0.1)).item()
    assert (entry.name, entry.rank, entry.max_rank) == ("base_model.model.2", 4, 4)
    assert entry.bits == {"up": 8, "input": 2}
    assert entry.expected_rank == pytest.approx(2 + 2 * p, rel=1e-5)
    assert entry.expected_bits["up"] == pytest.approx(8.0, abs=0.03)
    assert entry.expected_bits["input"] == pytest.approx(2.0, abs=0.02)
    assert summarize(model.train()) == summarize(model.eval()) == [entry]


def test_what_is_not_learned_is_full(mlp, adapt) -> None:
    assert summarize(adapt(mlp, r=3, target_modules=["0"], learn_bits=False, learn_rank=False)) == [
        LayerSummary("base_model.model.0", 3, 3, None, {}, {})
    ]


def _learning(mlp, adapt, **settings):
    model = adapt(mlp, r=4, target_modules=["0", "2"], quantizers=["up", "input"], **settings)
    layers = [layer for _, layer in adapted_layers(model)]
    with torch.no_grad():
        for layer in layers:
            gates = layer.gates_of("default")
            gates.bit_logits.copy_(torch.tensor([[9.0, -0.9, -9.0, 9.0], [-9.0, 9.0, 9.0, 9.0]]))
            gates.rank_logits.copy_(torch.tensor([2.0, 1.0, -1.0]))
    return model, layers


def test_open_probabilities_are_those_of_single_gates_and_marginals_their_products(mlp, adapt) -> None:
    model, (layer, _) = _learning(mlp, adapt)
    entry = summarize(model)[0]
    gates = layer.gates_of("default")
    assert entry.bit_open_probabilities["up"] == pytest.approx(torch.sigmoid(gates.bit_logits[0] + SHIFT).tolist())
    assert entry.rank_open_probabilities == pytest.approx(torch.sigmoid(gates.rank_logits).tolist())
    assert entry.rank_gate == "ste"
    assert entry.width_marginals()["up"] == pytest.approx(gates.width_probabilities()[0].tolist())
    assert entry.rank_marginals() == pytest.approx(gates.rank_probabilities().tolist())


def test_sampled_rank_gates_are_shifted_like_those_of_widths(mlp, adapt) -> None:
    model, (layer, _) = _learning(mlp, adapt, rank_gate="hard_concrete")
    entry = summarize(model)[0]
    single = torch.sigmoid(layer.gates_of("default").rank_logits + SHIFT)
    assert (entry.rank_gate, entry.rank_open_probabilities) == ("hard_concrete", pytest.approx(single.tolist()))


def test_deciding_gates_end_with_the_first_that_is_closed_and_agree_with_inference(mlp, adapt) -> None:
    model, _ = _learning(mlp, adapt)
    entry = summarize(model)[0]
    decided = entry.deciding_gates()
    assert [(gate.site, gate.level) for gate in decided if gate.is_open] == [
        ("rank", 2),
        ("rank", 3),
        ("up", 4),
        ("up", 8),
    ]
    assert (entry.rank, entry.bits) == (3, {"up": 8, "input": 2})
    least = entry.least_certain()
    assert least is not None
    assert (least.site, least.level, round(least.margin, 3)) == ("up", 8, 0.008)


def test_hardened_layers_have_widths_and_no_probabilities(mlp, rows, adapt, learn) -> None:
    model = adapt(mlp, r=2, target_modules=["0"], quantizers=["weight", "input"])
    learn(model, rows)
    before = summarize(model)[0]
    (entry,) = summarize(harden(model))
    assert (entry.rank, entry.bits) == (before.rank, before.bits)
    assert entry.bit_open_probabilities == entry.shared == {}
    assert (entry.rank_open_probabilities, entry.rank_gate, entry.least_certain()) == ((), None, None)


def test_a_shared_input_is_listed_for_each_reader_with_its_owner(bert, adapt) -> None:
    model = adapt(bert, r=2, target_modules=["query", "key"], quantizers=["weight", "input"], tie_groups="fused")
    query, key = summarize(model)[:2]
    assert list(key.bits) == list(query.bits) == ["weight", "input"]
    assert (query.shared, key.shared) == ({}, {"weight": query.name, "input": query.name})
    assert key.bit_open_probabilities == query.bit_open_probabilities


def test_it_prints_as_a_table(mlp, bert, adapt) -> None:
    model, _ = _learning(mlp, adapt)
    head, first, second, _, note = str(summarize(model)).splitlines()
    assert head.split() == ["layer", "rank", "up", "input", "least", "certain", "gate"]
    expected = summarize(model)[0].expected_rank
    assert first.startswith(f"0      3 of 4 ({expected:.1f})  8 (")
    assert first.endswith("up at 8 bits, open with 0.67 (on above 0.66)")
    assert second.startswith("2 ")
    assert note == "Rank and bits at inference, in brackets the means under the gate probabilities."
    shared = adapt(bert, r=2, target_modules=["query", "key"], quantizers=["input"])
    assert "32= (" in str(summarize(shared))
    assert str(summarize(model, "other")) == "no layer has this adapter"


def test_an_adapter_that_no_layer_has_gives_an_empty_list(mlp, adapt) -> None:
    assert summarize(adapt(mlp, target_modules=["0"]), "other") == []
