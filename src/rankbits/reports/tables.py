"""Records as rows of text: the closing table, and the cells that the page shares with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from rankbits.records import RunRecord, Site
from rankbits.records.metrics import lower_is_better

COLUMNS = ("method", "score", "mean rank", "bits of W0", "bits of adapters", "trainable", "minutes")
FULL_PRECISION = "full"
NOTHING_ADAPTED = "none"
AS_LOADED = "as loaded"

SITE_LABELS: dict[Site, str] = {
    "weight": "W0",
    "down": "A",
    "diagonal": "E",
    "up": "B",
    "down_output": "A out",
    "diagonal_output": "E out",
    "output": "out",
    "input": "in",
    "probabilities": "P",
}


def run_table(records: Sequence[RunRecord]) -> list[list[str]]:
    """One row of text cells per record, under COLUMNS: the table a run ends with, methods beside each other.

    Scores are in percent, a language model's loss in nats per token.
    "(fixed)" marks a rank that was not learned, "full" a tensor that was not quantized, "as loaded" a weight that
    keeps the few bits that the base was loaded in.
    """
    return [
        [
            label,
            score_text(record),
            rank_text(record),
            weight_bits_text(record),
            bits_text(record.mean_adapter_bits()),
            f"{record.parameters.trainable:,}",
            f"{record.training.seconds / 60:.1f}",
        ]
        for label, record in zip(labels(records), records, strict=True)
    ]


def labels(records: Sequence[RunRecord]) -> list[str]:
    """A name for each record: its method, with task, seed and run name added only where they tell records apart."""
    ways: tuple[Callable[[RunRecord], str], ...] = (
        lambda record: record.method,
        lambda record: f"{record.method}, {record.data.task}",
        lambda record: f"{record.method}, seed {record.seed}",
        lambda record: f"{record.method}, {record.name}",
        lambda record: f"{record.method}, {record.data.task}, seed {record.seed}",
    )
    for way in ways:
        candidates = [way(record) for record in records]
        if len(set(candidates)) == len(records):
            return candidates
    full = [f"{record.method}, {record.name}, seed {record.seed}" for record in records]
    counts = Counter(full)
    return [f"{text} ({number})" if counts[text] > 1 else text for number, text in enumerate(full, start=1)]


def score_text(record: RunRecord) -> str:
    """The headline score with its metric: "78.52 accuracy" in percent, "1.2345 loss ↓" where less is better."""
    score = record.primary_score()
    if lower_is_better(score.metric):
        return f"{score.value:.4f} {score.metric} ↓"
    return f"{score.value:.2f} {score.metric}"


def has_learned_rank(record: RunRecord) -> bool:
    """Whether ranks were learned: a matrix with rank gates has an expected rank, a pruned one less than its largest."""
    return any(module.expected_rank is not None or module.rank < module.max_rank for module in record.modules)


def has_bits(record: RunRecord) -> bool:
    """Whether any tensor of the run was quantized."""
    return any(module.bits for module in record.modules)


def rank_text(record: RunRecord) -> str:
    """Mean rank over the adapted matrices, marked where it was given and not learned."""
    mean = record.mean_rank()
    if mean is None:
        return NOTHING_ADAPTED
    return f"{mean:.2f}" if has_learned_rank(record) else f"{mean:.2f} (fixed)"


def weight_bits_text(record: RunRecord) -> str:
    """Mean width of the weights that have a quantizer; "as loaded" if a base that was quantized already has none."""
    bits = record.mean_bits("weight")
    kept = any(module.quantized_base for module in record.modules)
    return AS_LOADED if bits is None and kept else bits_text(bits)


def bits_text(bits: float | None) -> str:
    """A mean width in bits; None means that nothing there was quantized."""
    return FULL_PRECISION if bits is None else f"{bits:.2f}"
