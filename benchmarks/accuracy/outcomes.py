"""What a result says in numbers: score, what the adapted layers and the whole model cost, what was learned."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from scipy.stats import t as student
from scratch import result_file

from rankbits.records import RunRecord
from rankbits.records.costs import CostRecord

REFERENCE_BITS = 32


@dataclass(frozen=True)
class Outcome:
    """One finished run.

    Args:
        score: the task's primary metric, in percent.
        bops: bit operations of the adapted layers, adapters included, as a share of theirs at 32 bits.
        weight_bytes: bytes of the adapted layers' weights, adapters and ranges included, as a share of theirs in fp32.
        whole: bit operations of the whole model, attention products included, as a share of its at 32 bits.
        rank: mean rank.
        weight_bits: mean width of the weights, None without quantizers.
        input_bits: mean width of the inputs, likewise.
        seconds: of training.
        loss: mean over training.
    """

    score: float
    bops: float
    weight_bytes: float
    whole: float
    rank: float | None
    weight_bits: float | None
    input_bits: float | None
    seconds: float
    loss: float


@cache
def outcome(name: str) -> Outcome | None:
    """The numbers of a point that was trained; None while it is not there."""
    path = result_file(name)
    if not path.is_file():
        return None
    record = RunRecord.read(path)
    layers = {module.name for module in record.modules}
    bops, size = (_bops(record.costs, layers), _bytes(record.costs, layers)) if record.costs else (1.0, 1.0)
    return Outcome(
        score=record.primary_score().value,
        bops=bops,
        weight_bytes=size,
        whole=record.costs.percent(32) / 100 if record.costs else 1.0,
        rank=record.mean_rank(),
        weight_bits=record.mean_bits("weight"),
        input_bits=record.mean_bits("input"),
        seconds=record.training.seconds,
        loss=record.training.train_loss,
    )


def _belongs(module: str, layers: set[str]) -> bool:
    return any(module == layer or module.startswith(f"{layer}.") for layer in layers)


def _bops(costs: CostRecord, layers: set[str]) -> float:
    mine = [product for product in costs.products if _belongs(product.module, layers)]
    reference = sum(product.macs for product in mine if product.adapter is None) * REFERENCE_BITS**2
    return sum(product.bops for product in mine) / reference


def _bytes(costs: CostRecord, layers: set[str]) -> float:
    """Of weights in products: biases are beside them in every method."""
    mine = [w for w in costs.weights if _belongs(w.module, layers) and w.operand != "bias"]
    reference = sum(weight.elements for weight in mine if weight.operand == "W0") * REFERENCE_BITS / 8
    return sum(weight.size_bytes for weight in mine) / reference


@cache
def rounded(name: str) -> dict[str, dict[str, Any]]:
    """The schemes of a point that was rounded after training, by name; empty while it is not there."""
    path = result_file(name)
    if not path.is_file():
        return {}
    return {entry["scheme"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["schemes"]}


def before_rounding(name: str) -> float | None:
    """The score of the LoRA model that such a point rounds; training it anew elsewhere may give another one."""
    path = result_file(name)
    if not path.is_file():
        return None
    return float(next(iter(json.loads(path.read_text(encoding="utf-8"))["unrounded"].values())))


@dataclass(frozen=True)
class Sample:
    """Numbers of several seeds."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None of one number."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval of the mean by Student's t; None of one number."""
        if self.deviation is None:
            return None
        count = len(self.values)
        return float(student.ppf(0.975, count - 1)) * self.deviation / math.sqrt(count)


def spread(sample: Sample) -> str:
    """Mean ± sample standard deviation, or the one number."""
    return f"{sample.mean:.2f}" + (f" ± {sample.deviation:.2f}" if sample.deviation is not None else "")


def interval(sample: Sample) -> str:
    """Mean with its 95 % interval, signed; or the one number."""
    if sample.half_width is None:
        return f"{sample.mean:+.2f}"
    low, high = sample.mean - sample.half_width, sample.mean + sample.half_width
    return f"{sample.mean:+.2f} [{low:+.2f}, {high:+.2f}]"
