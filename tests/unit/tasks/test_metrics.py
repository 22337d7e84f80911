"""Scores: hand-worked values, undefined cases, and outputs that cannot be scored."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rankbits import tasks
from rankbits.errors import NonFiniteError, TaskError


def logits(classes: list[int], num_labels: int = 2) -> np.ndarray:
    """Outputs whose largest entry is at the class given; the others are not zero, so that only the order counts."""
    return np.eye(num_labels)[classes] * 3.0 - 1.5


# Predicted 1 1 1 0 0 against 1 1 0 0 1: true positives 2, false positives 1, false negatives 1, true negatives 1.
PREDICTED, LABELS = logits([1, 1, 1, 0, 0]), np.array([1, 1, 0, 0, 1])


def test_accuracy_and_f1_of_mrpc_by_hand() -> None:
    assert tasks.get("mrpc").score(PREDICTED, LABELS) == pytest.approx({"accuracy": 60.0, "f1": 100 * 4 / 6})


def test_matthews_of_cola_by_hand() -> None:
    by_hand = (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    assert tasks.get("cola").score(PREDICTED, LABELS) == pytest.approx({"matthews": 100 * by_hand})


def test_accuracy_over_three_classes() -> None:
    scores = tasks.get("mnli").score(logits([0, 1, 2, 2], 3), np.array([0, 1, 2, 0]))
    assert scores == {"accuracy": 75.0}


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_pearson_and_spearman_of_stsb_by_hand(shape: tuple[int, ...]) -> None:
    predicted, labels = np.array([0.0, 1.0, 2.0, 9.0]), np.array([0.0, 1.0, 3.0, 2.0])
    # Centred: predicted (-3, -2, -1, 6), labels (-1.5, -.5, 1.5, .5); ranks 1 2 3 4 against 1 2 4 3.
    pearson = (4.5 + 1.0 - 1.5 + 3.0) / math.sqrt(50 * 5)
    scores = tasks.get("stsb").score(predicted.reshape(shape), labels)
    assert scores == pytest.approx({"pearson": 100 * pearson, "spearman": 100 * (1 - 6 * 2 / (4 * 15))})


def test_constant_predictions_correlate_at_zero_without_a_warning() -> None:
    assert tasks.get("stsb").score(np.full(3, 2.5), np.array([1.0, 2.0, 4.0])) == {"pearson": 0.0, "spearman": 0.0}


def test_predictions_that_vary_by_less_than_rounding_correlate_at_zero_without_a_warning() -> None:
    predicted = np.array([1.0, 1.0, 1.0 + 2**-52])
    assert tasks.get("stsb").score(predicted, np.array([1.0, 2.0, 4.0]))["pearson"] == 0.0


def test_a_single_row_has_no_correlation() -> None:
    assert tasks.get("stsb").score(np.array([1.0]), np.array([2.0])) == {"pearson": 0.0, "spearman": 0.0}


def test_a_model_that_always_says_no_scores_without_a_warning() -> None:
    nothing = logits([0, 0, 0])
    assert tasks.get("mrpc").score(nothing, np.array([0, 0, 0])) == {"accuracy": 100.0, "f1": 0.0}
    assert tasks.get("cola").score(nothing, np.array([0, 1, 1])) == {"matthews": 0.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_are_not_finite_are_refused_with_their_row(value: float) -> None:
    predicted = logits([1, 1, 1])
    predicted[1, 0] = value
    with pytest.raises(NonFiniteError, match=r"1 of 3 predictions .* first at row 2"):
        tasks.get("sst2").score(predicted, np.array([1, 1, 1]))


@pytest.mark.parametrize(
    ("name", "shape", "labels"),
    [
        ("sst2", (3, 3), (3,)),
        ("sst2", (3,), (3,)),
        ("sst2", (3, 2), (4,)),
        ("stsb", (3, 2), (3,)),
        ("stsb", (0,), (0,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(TaskError, match="cannot be scored; expected"):
        tasks.get(name).score(np.zeros(shape), np.zeros(labels))
