"""The gates give the values that exact decimals give, and the file of those values is what its generator prints."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from rankbits.gates import chain, hard_concrete
from rankbits.quant.grid import expected_bits

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "gates.json").read_text(encoding="utf-8"))
TABLE = pytest.mark.parametrize("row", GOLDEN["table"], ids=lambda row: row["logit"])


def _double(value: str) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def _close(value: torch.Tensor, golden: str) -> None:
    torch.testing.assert_close(value, _double(golden), rtol=1e-13, atol=1e-15)


def test_the_file_is_what_its_generator_prints():
    spec = importlib.util.spec_from_file_location("make_gates", HERE / "make_gates.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.golden() == GOLDEN


def test_constants():
    assert pytest.approx(float(GOLDEN["shift"]), rel=1e-15) == hard_concrete.SHIFT
    assert pytest.approx(float(GOLDEN["open_logit"]), rel=1e-15) == hard_concrete.OPEN_LOGIT
    assert round(hard_concrete.SHIFT, 6) == 1.598597
    assert round(hard_concrete.OPEN_LOGIT, 6) == -0.935303


@TABLE
def test_probabilities(row):
    logit = _double(row["logit"])
    opened, saturated = hard_concrete.open_probability(logit), hard_concrete.saturated_probability(logit)
    _close(1.0 - opened, row["closed"])
    _close(saturated, row["saturated"])
    _close(opened - saturated, row["between"])


@TABLE
def test_median_gate(row):
    _close(hard_concrete.mean(_double(row["logit"])), row["mean"])


@TABLE
def test_expected_bits(row):
    gates = hard_concrete.open_probability(_double(row["logit"])).expand(4)
    _close(expected_bits(chain.cumulative(gates)), row["expected_bits"])


@pytest.mark.parametrize("entry", GOLDEN["samples"], ids=lambda entry: f"{entry['logit']}-{entry['noise']}")
def test_sampled_gates(entry):
    _close(hard_concrete.sample(_double(entry["logit"]), _double(entry["noise"])), entry["value"])


@pytest.mark.parametrize(
    ("name", "logit", "chains"), [("252_quantizers_at_6", 6.0, 252), ("252_quantizers_at_2", 2.0, 252)]
)
def test_penalty_of_bit_widths(name, logit, chains):
    probabilities = hard_concrete.open_probability(torch.full((chains, 4), logit, dtype=torch.float64))
    cost = chain.expected_cost(probabilities, torch.ones(4, dtype=torch.float64)).sum()
    _close(cost, GOLDEN[f"penalty_of_{name}"])


def test_penalty_of_one_quantizer():
    probabilities = hard_concrete.open_probability(torch.full((4,), 6.0, dtype=torch.float64))
    _close(chain.expected_cost(probabilities, torch.tensor(1.0)), GOLDEN["penalty_of_one_quantizer_at_6"])
    assert round(float(GOLDEN["penalty_of_one_quantizer_at_6"]), 5) == 3.99499


def test_penalty_of_ranks():
    probabilities = torch.sigmoid(torch.full((36, 7), 6.0, dtype=torch.float64))
    cost = chain.expected_cost(probabilities, torch.tensor(1.0)).sum()
    _close(cost, GOLDEN["penalty_of_36_ranks_of_8_at_6"])


@pytest.mark.parametrize("strength", GOLDEN["kl"]["nats_by_strength"])
def test_kl_in_nats(strength):
    probabilities = torch.tensor([float(p) for p in GOLDEN["kl"]["probabilities"]], dtype=torch.float64)
    _close(chain.kl_nats(probabilities, float(strength)), GOLDEN["kl"]["nats_by_strength"][strength])
