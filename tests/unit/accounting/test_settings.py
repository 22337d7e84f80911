"""Settings of a training run: what is refused, and widths that follow."""

from __future__ import annotations

import pytest

from rankbits.accounting.settings import TrainingSettings
from rankbits.errors import ModelError


def settings(**changes: object) -> TrainingSettings:
    return TrainingSettings(**{"batch": 2, "sequence_length": 3, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch: given 0, expected at least 1"),
        ({"sequence_length": -1}, "sequence_length: given -1"),
        ({"precision": "fp16"}, "precision: given 'fp16', expected one of fp32, bf16"),
        ({"base": "int8"}, "base: given 'int8'"),
        ({"optimizer": "sgd"}, "optimizer: given 'sgd'"),
        ({"attention": "flash"}, "attention: given 'flash'"),
        ({"device": "tpu"}, "device: given 'tpu'"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        settings(**change)


@pytest.mark.parametrize(
    ("precision", "base", "activation", "weight", "autocast", "throughout"),
    [
        ("fp32", "fp32", 4, 4, False, False),
        ("bf16", "fp32", 2, 4, True, False),
        ("bf16", "bf16", 2, 2, False, True),
        ("fp32", "fp16", 4, 2, False, False),
        ("fp32", "nf4", 4, 4, False, False),
        ("bf16", "nf4-double", 2, 2, False, False),
    ],
)
def test_widths_follow_from_precision_and_base(
    precision: str, base: str, activation: int, weight: int, autocast: bool, throughout: bool
) -> None:
    found = settings(precision=precision, base=base)
    assert (found.activation_bytes, found.base_bytes) == (activation, weight)
    assert (found.autocast, found.half_throughout) == (autocast, throughout)
    assert found.tokens == 6
