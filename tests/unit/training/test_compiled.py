"""A compiled model: one graph wherever passes record and measure nothing, and nothing compiled where they do."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from rankbits import BayesianLoraConfig, GateSchedule, harden

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function'> should not be instantiated:DeprecationWarning"),
]
STEPS, CALIBRATION = 16, 2
INPUTS = torch.arange(48).reshape(8, 6) % 20
LABELS = INPUTS[:, 0] % 2


def _model(placement: str, change: Callable[[BertForSequenceClassification], None] = lambda base: None) -> PeftModel:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    base = BertForSequenceClassification(BertConfig(**sizes, **still, vocab_size=20, max_position_embeddings=8))
    change(base)
    config = BayesianLoraConfig(
        r=3,
        target_modules=["query", "key", "value"],
        placement=placement,
        quantizers=["weight", "input"],
        calibration_passes=CALIBRATION,
        task_type="SEQ_CLS",
    )
    return get_peft_model(base, config)


class _Graphs:
    """A backend that counts the products of each graph, and runs it as it is."""

    def __init__(self) -> None:
        self.products: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        self.products.append(sum(node.target is torch._C._nn.linear for node in graph.graph.nodes))
        return graph.forward


def _steps(model: nn.Module, compiled: nn.Module, schedule: GateSchedule) -> Iterator[float]:
    """Losses of the steps of a run, one by one."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(STEPS):
        loss = compiled(input_ids=INPUTS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield float(loss.detach())


@pytest.mark.parametrize("placement", ["merged", "separate"])
@pytest.mark.parametrize(
    ("settings", "alike"),
    [
        ({"budget": "bops=0.5", "phases": (0.5, 0, 0.5)}, STEPS),
        # Compiled layers do not share what was made of an input, so that gates are drawn in another order.
        ({"phases": (0.25, 0.25, 0.25)}, CALIBRATION + 1),
    ],
)
def test_each_phase_that_records_nothing_is_one_graph(placement: str, settings: dict[str, Any], alike: int) -> None:
    torch.compiler.reset()
    eager = _model(placement).train()
    torch.manual_seed(0)
    expected = list(_steps(eager, eager, GateSchedule(eager, STEPS, **settings)))
    model, graphs = _model(placement).train(), _Graphs()
    schedule = GateSchedule(model, STEPS, **settings)
    torch.manual_seed(0)
    found, new = [], []
    for loss in _steps(model, torch.compile(model, backend=graphs), schedule):
        found.append(loss)
        new.append(len(graphs.products))
        graphs.products.clear()
    assert found[:alike] == pytest.approx(expected[:alike], abs=1e-6)
    assert new[: CALIBRATION + 1] == [0] * (CALIBRATION + 1)
    # Gates are measured from the middle of the warm-up to its end, and each graph is made once for its phase.
    fixed = schedule.fixed_from
    assert new[fixed] == 1
    assert new[fixed + 1 :] == [0] * (STEPS - fixed - 1)
    assert sum(new) == 2


def _graphs_of_a_run(model: PeftModel) -> list[int]:
    """Products of each graph that the steps of a run under a budget make."""
    torch.compiler.reset()
    graphs = _Graphs()
    schedule = GateSchedule(model, STEPS, budget="bops=0.5", phases=(0.5, 0, 0.5))
    list(_steps(model, torch.compile(model, backend=graphs), schedule))
    return graphs.products


def test_adapters_that_are_not_active_are_not_waited_for() -> None:
    model = _model("merged").train()
    model.add_adapter("other", model.peft_config["default"])
    assert model.active_adapters == ["default"]
    assert len(_graphs_of_a_run(model)) == 2


def test_layers_that_never_run_are_not_waited_for() -> None:
    model = _model("merged", lambda base: base.bert.add_module("query", nn.Linear(16, 16))).train()
    assert "query" in model.get_base_model().bert._modules
    assert len(_graphs_of_a_run(model)) == 2


def test_evaluation_is_one_graph_where_training_is() -> None:
    torch.compiler.reset()
    model, graphs = _model("merged").train(), _Graphs()
    schedule = GateSchedule(model, STEPS, budget="bops=0.5", phases=(0.5, 0, 0.5))
    compiled, made = torch.compile(model, backend=graphs), {}
    standing, measuring, fixed = CALIBRATION + 1, STEPS // 2 - 1, STEPS // 2 + 1
    for step, _ in enumerate(_steps(model, compiled, schedule), start=1):
        if step in (standing, measuring, fixed):
            graphs.products.clear()
            model.eval()
            with torch.no_grad():
                torch.testing.assert_close(compiled(input_ids=INPUTS).logits, model(input_ids=INPUTS).logits)
            model.train()
            made[step] = len(graphs.products)
    assert made == {standing: 1, measuring: 0, fixed: 1}


def test_graphs_hold_the_whole_model() -> None:
    torch.compiler.reset()
    model, graphs = _model("merged").train(), _Graphs()
    schedule = GateSchedule(model, STEPS, budget="bops=0.2", phases=(0.5, 0, 0.5))
    list(_steps(model, torch.compile(model, backend=graphs), schedule))
    # Six for each of two layers, the pooler and the head.
    assert graphs.products[-1] == 6 * 2 + 2


def test_a_hardened_model_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    model = _model("merged").train()
    schedule = GateSchedule(model, STEPS, budget="bops=0.2", phases=(0.5, 0, 0.5))
    list(_steps(model, model, schedule))
    hardened = harden(model.eval())
    with torch.no_grad():
        expected = hardened(input_ids=INPUTS).logits
        found = torch.compile(hardened, backend="eager", fullgraph=True)(input_ids=INPUTS).logits
    assert torch.equal(found, expected)
