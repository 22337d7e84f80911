"""Budgets on bases that were loaded in 4 or 8 bits: their weights keep their grid, are counted with it, and said to."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from rankbits import BayesianLoraConfig, GateSchedule, cost, harden, summary
from rankbits.errors import ScheduleError
from rankbits.recipes import facts
from rankbits.tuners.bayesian_lora.config import PAPER_SITES, Site

pytestmark = pytest.mark.filterwarnings("ignore")


def _four_bits() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)  # type: ignore[no-any-return]


def _eight_bits() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer[0]


BASES = {4: _four_bits, 8: _eight_bits}


def _model(base: Callable[[], nn.Module], **settings: object) -> PeftModel:
    torch.manual_seed(0)
    chosen = {"r": 4, "quantizers": [*PAPER_SITES, Site.INPUT], "init_weights": False, "calibration_passes": 1}
    layers = nn.Sequential(base(), nn.Tanh(), nn.Linear(64, 2)).to("cpu")
    # Where transformers keeps what PEFT asks for: how torchao would quantize a merged weight again.
    again = SimpleNamespace(get_apply_tensor_subclass=lambda: None)
    object.__setattr__(layers, "hf_quantizer", SimpleNamespace(quantization_config=again))
    return get_peft_model(layers, BayesianLoraConfig(**(chosen | settings), target_modules=["0"]))


def _train(model: PeftModel, schedule: GateSchedule) -> None:
    model.train()
    for _ in range(schedule.total_steps):
        model(torch.randn(16, 64)).square().mean().backward()
        model.zero_grad()
        schedule.step()


@pytest.mark.parametrize("allocation", ["evidence", "descent"])
@pytest.mark.parametrize("bits", BASES)
def test_budgets_are_met_beside_weights_that_keep_their_bits(bits: int, allocation: str) -> None:
    model = _model(BASES[bits])
    budgets = [f"bops={0.1 * bits / 4}", f"bytes={0.35 * bits / 4}"]
    schedule = GateSchedule(model, 12, budget=budgets, allocation=allocation, phases=(0.34, 0.2, 0.2))
    _train(model, schedule)
    operations, size = schedule.budgets()
    assert operations.cost <= operations.budget.limit
    assert size.cost <= size.budget.limit
    harden(model.eval())
    record = cost(model, inputs={"input": torch.randn(5, 64)}, sequence_length=5, adapters="unmerged")
    weights = [w for w in record.weights if w.operand in {"W0", "A", "B", "E"} and w.module == "0"]
    assert {w.bits for w in weights if w.operand == "W0"} == {bits}
    assert size.cost == pytest.approx(sum(w.size_bytes for w in weights) / (2 * 64 * 64), rel=1e-12)
    products = [p for p in record.products if p.module == "0"]
    assert operations.cost == pytest.approx(sum(p.bops for p in products) / (64 * 64 * 5 * 16**2), rel=1e-12)


@pytest.mark.parametrize("bits", BASES)
def test_summary_and_record_say_that_the_weight_has_no_quantizer(bits: int) -> None:
    model = _model(BASES[bits])
    (entry,) = found = summary(model)
    assert entry.quantized_base
    assert "weight" not in entry.bits
    said = "weights of all layers keep the grid that the base was loaded with, and have no quantizer here"
    assert said in str(found)
    (module,) = facts.learned(model, found)
    assert module.quantized_base
    plain = summary(_model(lambda: nn.Linear(64, 64)))
    assert not plain[0].quantized_base
    assert "loaded with" not in str(plain)


def test_what_such_a_base_cannot_meet_is_refused_with_the_reason() -> None:
    with pytest.raises(ScheduleError, match=r"bits=3 cannot be met: .*its weights keep their 4 bits"):
        GateSchedule(_model(_four_bits), 12, budget="bits=3")
    with pytest.raises(ScheduleError, match=r"no quantizers.*keep their 4 bits; expected other quantizers"):
        GateSchedule(_model(_four_bits, quantizers=["weight"]), 12, budget="bits=4")
