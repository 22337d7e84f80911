"""The points of the study: what is trained, and what is rounded afterwards."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = ("e2e_nlg", "gsm8k")
STEPS = 120
EVALUATION_ROWS = {"e2e_nlg": 256, "gsm8k": 128}
"""Rows of the test split that are scored, drawn by the hash of their content: about 22,000 tokens of either task."""
OURS = (
    "adapter.placement=merged",
    "adapter.rounding=compensated",
    "adapter.quantizers=[weight]",
    "adapter.granularity=group",
    "adapter.weight_gradient_rows=256",
    "gates.warmup=0.2",
    "gates.range_learning_rate=0.01",
)
"""The default recipe of the encoder's study, for weights alone."""
BUDGETS = (3.5, 3.0, 2.5)


@dataclass(frozen=True)
class Grid:
    """How scales are stored, in our quantizer and in rounding after training alike.

    Args:
        group: weights of a row that share a scale.
        scale_bits: of each scale.
    """

    group: int
    scale_bits: int = 32

    @property
    def label(self) -> str:
        """What the name of a point says of it."""
        size = "" if self == COARSE else f"-group{self.group}"
        return size if self.scale_bits == 32 else f"{size}-scale{self.scale_bits}"


COARSE, FINE, FINEST = Grid(64), Grid(32), Grid(8, 8)
"""Scales take 0.5 bits of each weight, 1 bit, and 1 bit again: a byte for 8 weights instead of 4 bytes for 32."""


@dataclass(frozen=True)
class Trained:
    """A run of a recipe.

    Args:
        task: its recipe is <task>-smollm2.
        label: name of the point within its task.
        overrides: what differs from the recipe.
    """

    task: str
    label: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of its file of results."""
        return f"{self.task}-{self.label}"


@dataclass(frozen=True)
class Rounded:
    """The merged LoRA model with the weights of its linear layers rounded after training.

    Args:
        task: whose LoRA model.
        bits: mean width; between two whole numbers, layers get the one or the other. None leaves them as they are.
        grid: what its scales are like.
    """

    task: str
    bits: float | None
    grid: Grid = COARSE

    @property
    def name(self) -> str:
        """Name of its file of results."""
        if self.bits is None:
            return f"{self.task}-merged"
        return f"{self.task}-ptq-bits{self.bits:g}{self.grid.label}"


def ours(task: str, bits: float, grid: Grid, code_range: str = "full") -> Trained:
    """Learned widths of weights under a budget of mean bits, with 2^b - 1 or all 2^b codes at b bits."""
    form = (f"adapter.group_size={grid.group}", f"adapter.code_range={code_range}")
    form = form if grid.scale_bits == 32 else (*form, f"adapter.scale_bits={grid.scale_bits}")
    suffix = "" if code_range == "narrow" else f"-{code_range}"
    label = f"bayesian-lora-bits{bits:g}{grid.label}{suffix}"
    return Trained(task, label, (*OURS, *form, f"gates.budget=bits={bits:g}"))


def lora(task: str) -> Trained:
    """The LoRA run that all else of a task is compared with."""
    return Trained(task, "lora", ("method=lora",))


POINTS: tuple[Trained | Rounded, ...] = (
    *(lora(task) for task in TASKS),
    *(Rounded(task, bits) for bits in (None, 2, 2.5, 3, 3.5, 4) for task in TASKS),
    *(ours(task, bits, grid) for grid in (FINEST, FINE) for bits in BUDGETS for task in TASKS),
    *(ours(task, bits, grid, "narrow") for grid in (FINE, COARSE) for bits in BUDGETS for task in TASKS),
    *(Rounded(task, bits, grid) for grid in (FINEST, FINE) for bits in BUDGETS for task in TASKS),
)
