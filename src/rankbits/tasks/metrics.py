"""The official metrics of the tasks: of labels and of generated characters in percent, of answers in nats per token."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from rankbits.errors import NonFiniteError, TaskError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from rankbits.tasks.task import Metric, Task


def score(task: Task, predictions: NDArray[np.floating[Any]], labels: NDArray[Any]) -> dict[str, float]:
    """Every metric of a task; see `Task.score`."""
    if task.kind == "completion":
        return _of_answers(task, np.asarray(predictions, dtype=np.float64), np.asarray(labels))
    predicted = _predicted(task, np.asarray(predictions), np.asarray(labels))
    return {name: 100.0 * _METRICS[name](predicted, np.asarray(labels)) for name in task.metrics}


def _predicted(task: Task, predictions: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    """Turn a model's outputs into one class number or value a row: [n]."""
    rows = labels.shape[0] if labels.ndim == 1 else -1
    allowed = [(rows, task.num_labels)] + ([(rows,)] if task.kind == "regression" else [])
    if rows < 1 or predictions.shape not in allowed:
        expected = " or ".join(str(list(shape)) for shape in allowed) if rows >= 1 else "labels [n] with n >= 1"
        raise TaskError(
            f"task {task.name}: predictions {list(predictions.shape)} with labels {list(labels.shape)} "
            f"cannot be scored; expected {expected}"
        )
    _refuse_non_finite(task, predictions)
    if task.kind == "regression":
        return predictions.astype(np.float64).reshape(-1)  # [n]
    classes: NDArray[np.intp] = predictions.argmax(axis=1)  # [n]
    return classes


def _of_answers(task: Task, predictions: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Mean negative log-likelihood of a token, in nats, and its exponential; or the share of characters that are right.

    Long answers count for more than short ones: every token or character counts once, however rows were put into
    batches.
    """
    rows = labels.shape[0] if labels.ndim else -1
    unit = "characters" if task.memorised else "tokens"
    what = f"{'a number of right ones' if task.memorised else 'a sum of nats'} and a number of {unit}"
    if rows < 1 or predictions.shape != (rows, 2):
        raise TaskError(
            f"task {task.name}: predictions {list(predictions.shape)} with labels {list(labels.shape)} cannot be "
            f"scored; expected {what} for each of at least one row: [n, 2]"
        )
    _refuse_non_finite(task, predictions)
    total, units = predictions.sum(axis=0)  # [2]
    if not units > 0:
        raise TaskError(f"task {task.name}: the {rows} answers have no {unit}; expected at least one")
    mean = float(total / units)
    # A model that has come apart loses more nats than a float has room for once they are an exponent.
    perplexity = math.exp(min(mean, 700.0))
    values: dict[Metric, float] = {"loss": mean, "perplexity": perplexity, "character_accuracy": 100.0 * mean}
    return {name: values[name] for name in task.metrics}


def _refuse_non_finite(task: Task, predictions: NDArray[Any]) -> None:
    rows = len(predictions)
    finite = np.isfinite(predictions.astype(np.float64)).reshape(rows, -1).all(axis=1)  # [n]
    if not finite.all():
        raise NonFiniteError(
            f"task {task.name}: {int((~finite).sum())} of {rows} predictions are NaN or infinite, "
            f"the first at row {int(np.argmin(finite)) + 1}"
        )


def _accuracy(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    return float((predicted == labels).mean())


def _f1(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    """F1 of class 1, as GLUE scores MRPC and QQP; 0 when the class is neither present nor predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0.0))


def _matthews(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def _pearson(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predicted, labels)


def _spearman(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predicted, labels)


def _correlation(correlate: Callable[..., Any], predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    """A correlation, or 0 where it is undefined: for fewer than two rows or when one side is constant.

    A model whose outputs have collapsed to one value says nothing about the labels, and 0 is the correlation of saying
    nothing. NaN in its place would poison means over seeds, and a warning would end a run that evaluates an untrained
    head. scipy also refuses to trust a side that varies by less than rounding; such a side counts as constant.
    """
    from scipy.stats import ConstantInputWarning, NearConstantInputWarning

    if len(labels) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConstantInputWarning)
        warnings.simplefilter("error", NearConstantInputWarning)
        try:
            return float(correlate(predicted, labels).statistic)
        except (ConstantInputWarning, NearConstantInputWarning):
            return 0.0


_METRICS: dict[Metric, Callable[[NDArray[Any], NDArray[Any]], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
