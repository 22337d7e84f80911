"""What a layer is said to have learned is what its gates of inference are."""

import pytest
import torch

from rankbits import summarize
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


def test_an_adapter_that_no_layer_has_gives_an_empty_list(mlp, adapt) -> None:
    assert summarize(adapt(mlp, target_modules=["0"]), "other") == []
