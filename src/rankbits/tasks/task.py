"""What a task is: its columns, its labels and its metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["classification", "regression"]
Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]


@dataclass(frozen=True)
class Task:
    """One benchmark of single texts or pairs of texts, with one label a row.

    Args:
        name: what recipes call it.
        description: one line for listings.
        text_columns: the one or two columns that hold the text.
        kind: whether the label is a class number or a real number.
        label_names: names of the classes in the order of their numbers; empty for regression.
        label_range: lowest and highest label of a regression task, both included.
        metrics: what `score` returns.
        primary_metric: the one of `metrics` that a table shows when it shows only one.
        label_column: the column that holds the label.
        validation_names: the splits that are evaluated.
        hub_name: the data set on the Hugging Face hub; None for a task whose rows are embedded.
        hub_config: the configuration of that data set.
        group_column: rows that share a value here must never be on both sides of a split that we make.
        symmetric: whether a pair means the same with its two texts exchanged.
    """

    name: str
    description: str
    text_columns: tuple[str, ...]
    kind: Kind
    label_names: tuple[str, ...]
    metrics: tuple[Metric, ...]
    primary_metric: Metric
    label_range: tuple[float, float] | None = None
    label_column: str = "label"
    validation_names: tuple[str, ...] = ("validation",)
    hub_name: str | None = None
    hub_config: str | None = None
    group_column: str | None = None
    symmetric: bool = False

    @property
    def num_labels(self) -> int:
        """Outputs a model's head needs: one a class, or one for regression."""
        return len(self.label_names) if self.kind == "classification" else 1

    def score(self, predictions: NDArray[np.floating[Any]], labels: NDArray[Any]) -> dict[str, float]:
        """Every metric of the task, in percent (-100 to 100 for correlations, 0 to 100 for the others).

        Args:
            predictions: logits [n, classes], or predicted values [n] or [n, 1] for regression.
            labels: class numbers or values [n].

        Raises:
            TaskError: the shapes do not fit the task or each other, or there are no rows.
            NonFiniteError: a prediction is NaN or infinite.
        """
        # Listing tasks must stay cheap, and this import brings numpy.
        from rankbits.tasks import metrics

        return metrics.score(self, predictions, labels)
