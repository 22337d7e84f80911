"""The points of the comparison: every method of the family on an encoder and on a decoder, and what it has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from rankbits.recipes.catalogue import method_names

SEEDS = (42, 43, 44)
ENCODER, DECODER = "stsb", "e2e_nlg"
HEAD = "head"
"""The head alone, trained on all rows: every method of the encoder starts from that model."""
FEATURES, FEATURES_LONG = "feature-based", "feature-based-long"
"""That head trained on: the floors of the other methods of the encoder, each of those that make as many steps."""
UNTRAINED = "untrained"
"""The model as it is loaded: the floor of a trained head alone, and of all methods of the decoder."""
FLOORS = (UNTRAINED, HEAD, FEATURES, FEATURES_LONG)
METHODS = tuple(method for method in method_names() if method not in FLOORS)
USUAL_RATE = 1e-3
RATES = {
    "full": 1e-4,
    "top-layer": 3e-4,
    "rslora": 3e-4,
    "adalora": 5e-3,
    "dylora": 2e-3,
    "prefix": 3e-3,
    "prompt": 3e-3,
}
"""Learning rates on the encoder that are not the usual one. Whole weights and an update that is scaled by
alpha / sqrt(64) move in smaller steps; those of AdaLoRA, which starts from two small factors and a zero, and of DyLoRA,
whose ranks are not trained in every step, in larger ones."""

COMMON = (
    f"task.name={ENCODER}",
    "task.max_length=64",
    "adapter.modules_to_save=[pooler,classifier]",
    "training.group_by_length=true",
    "training.warmup_ratio=0.1",
    "training.scheduler=linear",
    "training.max_grad_norm=1",
    "training.epochs=1",
)
FIRST = (*COMMON, "training.batch_size=32", "task.train_rows=null")
STSB = (*COMMON, "training.batch_size=8", "task.train_rows=960", "adapter.targets=all-linear")
LONG = (*COMMON, "training.batch_size=16", "task.train_rows=null", "training.epochs=4")
SLOW = ("prefix", "prompt")
"""Methods that have learned little after the 120 steps of STSB; they get LONG, twelve times as many."""
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
SCORED_ROWS = 64
"""Rows of the decoder's test split that are scored, drawn by the hash of their content."""
OWN = {
    "bayesian-lora": (
        "adapter.targets=all-linear",
        "adapter.placement=merged",
        "adapter.granularity=group",
        "adapter.quantizers=[weight,input]",
        "adapter.weight_gradient_rows=256",
        "adapter.calibration_passes=10",
        "gates.budget=bops=0.25",
        "gates.warmup=0.2",
        "gates.range_learning_rate=0.01",
    ),
    "dylora": ("adapter.dylora.mode=prefix",),
}
"""What a method changes of its recipe. Ours runs under a budget, a quarter of the 16-bit operations. DyLoRA trains all
ranks up to the drawn one: one at a time needs more steps than these."""


@dataclass(frozen=True)
class Point:
    """One result.

    Args:
        task: ENCODER or DECODER.
        method: the word of recipes, HEAD or UNTRAINED.
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
        return f"methods/{FEATURES if self.method in FLOORS else self.method}"

    @property
    def start(self) -> Point | None:
        """The point whose model it starts from, None where it starts from the pre-trained one."""
        begins = self.task == DECODER or self.method in (HEAD, UNTRAINED)
        return None if begins else Point(ENCODER, HEAD, self.seed)

    @property
    def floor(self) -> str:
        """What it has to beat: the word in the name of that point."""
        if self.task == DECODER or self.method in FLOORS:
            return UNTRAINED
        return FEATURES_LONG if self.method in SLOW else FEATURES

    @property
    def changes(self) -> tuple[str, ...]:
        """What the recipe is changed to. On the decoder methods keep the learning rates of their recipes."""
        own = OWN.get(self.method, ())
        if self.task == DECODER:
            return (*E2E, *own, f"training.seed={self.seed}")
        rate = f"training.learning_rate={RATES.get(self.method, USUAL_RATE):g}"
        rows = FIRST if self.start is None else LONG if self.method in (*SLOW, FEATURES_LONG) else STSB
        return (*rows, *own, rate, f"training.seed={self.seed}")


def _all() -> list[Point]:
    encoder = [Point(ENCODER, method, seed) for seed in SEEDS for method in (*FLOORS, *METHODS)]
    # A decoder's head is its table of embeddings, which cannot train alone.
    decoder = [Point(DECODER, method, SEEDS[0]) for method in (UNTRAINED, *METHODS)]
    return [*encoder, *decoder]


POINTS = _all()
