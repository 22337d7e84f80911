"""What a task is: its columns, its labels or its answers, and its metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["classification", "regression", "completion"]
Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman", "loss", "perplexity", "character_accuracy"]


@dataclass(frozen=True)
class Task:
    """One benchmark: texts or pairs of texts with one label a row, or prompts with the answers to learn.

    Args:
        name: what recipes call it.
        description: one line for listings.
        text_columns: the one or two columns that hold the text.
        kind: whether the label is a class number or a real number, or whether a language model completes a prompt with
            an answer; such a task has no labels.
        label_names: names of the classes in the order of their numbers; empty for the other kinds.
        label_range: lowest and highest label of a regression task, both included.
        metrics: what `score` returns.
        primary_metric: the one of `metrics` that a table shows when it shows only one.
        label_column: the column that holds the label; None for completion.
        train_name: the split that is learned from.
        validation_names: the splits that are evaluated.
        set_aside: share of the training split that is never learned from, also where it is not evaluated; 0 where a
            development slice is held out only when it is asked for.
        hub_name: the data set on the Hugging Face hub; None for a task whose rows are embedded.
        hub_config: the configuration of that data set.
        group_column: rows that share a value here must never be on both sides of a split that we make.
        memorised: whether the rows that were learned are those that are scored, and the answers are generated for it.
        symmetric: whether a pair means the same with its two texts exchanged.
        prompt: what comes before an answer, with a {column} for each text it shows; of completion alone.
        answer: what is learned after the prompt, likewise.
    """

    name: str
    description: str
    text_columns: tuple[str, ...]
    kind: Kind
    label_names: tuple[str, ...]
    metrics: tuple[Metric, ...]
    primary_metric: Metric
    label_range: tuple[float, float] | None = None
    label_column: str | None = "label"
    train_name: str = "train"
    validation_names: tuple[str, ...] = ("validation",)
    hub_name: str | None = None
    hub_config: str | None = None
    group_column: str | None = None
    memorised: bool = False
    symmetric: bool = False
    set_aside: float = 0.0
    prompt: str = ""
    answer: str = ""

    @property
    def num_labels(self) -> int:
        """Outputs a model's head needs: one a class, one for regression, none beside its words for completion."""
        return 1 if self.kind == "regression" else len(self.label_names)

    def score(self, predictions: NDArray[np.floating[Any]], labels: NDArray[Any]) -> dict[str, float]:
        """Every metric of the task: the loss of answers in nats per token, its perplexity, all others in percent.

        Percents are from -100 to 100 for correlations and from 0 to 100 for the others. Of loss and perplexity less is
        better (`rankbits.records.metrics`).

        Args:
            predictions: logits [n, classes], predicted values [n] or [n, 1] for regression, or for completion the sum
                of each answer's negative log-likelihoods in nats and its number of tokens [n, 2]; for a memorised task
                the characters of each answer that were generated right and all of its characters [n, 2].
            labels: class numbers or values [n]; for completion one row of anything for each answer.

        Raises:
            TaskError: the shapes do not fit the task or each other, or there are no rows.
            NonFiniteError: a prediction is NaN or infinite.
        """
        # Listing tasks must stay cheap, and this import brings numpy.
        from rankbits.tasks import metrics

        return metrics.score(self, predictions, labels)
