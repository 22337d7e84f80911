"""Units and directions of metrics: only what says how surprised a language model was is better when it is low."""

from typing import get_args

import pytest

from rankbits.records.metrics import lower_is_better, unit
from rankbits.tasks.task import Metric


@pytest.mark.parametrize(("metric", "expected"), [("loss", "nats per token"), ("perplexity", "tokens")])
def test_surprise_is_not_in_percent_and_less_is_better(metric: str, expected: str) -> None:
    assert unit(metric) == expected
    assert lower_is_better(metric)


@pytest.mark.parametrize("metric", sorted(set(get_args(Metric)) - {"loss", "perplexity"}))
def test_all_others_are_in_percent_and_more_is_better(metric: str) -> None:
    assert unit(metric) == "percent"
    assert not lower_is_better(metric)
