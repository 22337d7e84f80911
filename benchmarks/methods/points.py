"""The points of the comparison: every method of the family on an encoder and on a decoder, and what it has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from rankbits.recipes.catalogue import method_names

SEEDS = (42, 43, 44)
ENCODER, DECODER = "stsb", "e2e_nlg"
FEATURES = "feature-based"
"""The frozen encoder below a trained head: the floor of every other method there."""
UNTRAINED = "untrained"
"""The model as it is loaded: the floor of a trained head alone, and of all methods of the decoder."""
ALL_LINEAR = "adapter.targets=all-linear"
USUAL_RATE = 2e-3
"""Of adapters and heads on the encoder: four times less had not taught LoRA anything after 30 steps."""
RATES = {"full": 2e-4, "top-layer": 5e-4, "prefix": 5e-3, "prompt": 5e-3}
"""Whole weights move in smaller steps, virtual tokens in larger ones."""

STSB = (
    f"task.name={ENCODER}",
    "task.max_length=64",
    "task.train_rows=480",
    "adapter.modules_to_save=[pooler,classifier]",
    ALL_LINEAR,
    "training.batch_size=16",
    "training.epochs=2",
    "training.group_by_length=true",
    "training.warmup_ratio=0.1",
    "training.scheduler=linear",
    "training.max_grad_norm=1",
)
E2E = (
    f"task.name={DECODER}",
    "model=smollm2",
    "task.max_length=96",
    "task.train_rows=96",
    "training.batch_size=4",
    "training.max_steps=24",
    "training.group_by_length=true",
    "training.scheduler=linear",
    "training.max_grad_norm=1",
)
WORK = {ENCODER: STSB, DECODER: E2E}
SCORED_ROWS = 64
"""Rows of the decoder's test split that are scored, drawn by the hash of their content."""
OWN = {
    "bayesian-lora": (
        ALL_LINEAR,
        "adapter.placement=merged",
        "adapter.granularity=group",
        "adapter.quantizers=[weight,input]",
        "adapter.weight_gradient_rows=256",
        "adapter.calibration_passes=10",
        "gates.budget=bops=0.25",
        "gates.warmup=0.2",
        "gates.range_learning_rate=0.01",
    ),
}
"""What a method changes of its recipe. Ours runs under a budget, a quarter of the 16-bit operations."""


@dataclass(frozen=True)
class Point:
    """One result.

    Args:
        task: ENCODER or DECODER.
        method: the word of recipes, or UNTRAINED.
        seed: of head, adapter and order of rows.
    """

    task: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its file of results, without the extension."""
        return f"{self.task}-{self.method}-seed{self.seed}"

    @property
    def recipe(self) -> str:
        """The shipped recipe of the method."""
        return f"methods/{FEATURES if self.method == UNTRAINED else self.method}"

    @property
    def changes(self) -> tuple[str, ...]:
        """What the recipe is changed to. On the decoder methods keep the learning rates of their recipes."""
        rates = (f"training.learning_rate={RATES.get(self.method, USUAL_RATE):g}",) if self.task == ENCODER else ()
        return (*WORK[self.task], *OWN.get(self.method, ()), *rates, f"training.seed={self.seed}")


def _all() -> list[Point]:
    methods = (UNTRAINED, *method_names())
    encoder = [Point(ENCODER, method, seed) for seed in SEEDS for method in methods]
    # A decoder's head is its table of embeddings, which cannot train alone.
    decoder = [Point(DECODER, method, SEEDS[0]) for method in methods if method != FEATURES]
    return [*encoder, *decoder]


POINTS = _all()
