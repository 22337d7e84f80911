"""The points of the study: what is trained, and what is rounded afterwards."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = ("e2e_nlg", "gsm8k")
STEPS = 120
GROUP, FINE_GROUP = 64, 32
"""Weights that share a scale, in our quantizer and in rounding after training alike; scales of 4 bytes take 0.5 and 1
bit of each weight."""
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
        group: weights that share a scale.
    """

    task: str
    bits: float | None
    group: int = GROUP

    @property
    def name(self) -> str:
        """Name of its file of results."""
        if self.bits is None:
            return f"{self.task}-merged"
        return f"{self.task}-ptq-bits{self.bits:g}{_finer(self.group)}"


def _finer(group: int) -> str:
    """What the name of a point says of its groups."""
    return "" if group == GROUP else f"-group{group}"


def ours(task: str, bits: float, group: int, code_range: str = "narrow") -> Trained:
    """Learned widths of weights under a budget of mean bits, with 2^b - 1 or all 2^b codes at b bits."""
    grid = (f"adapter.group_size={group}", f"adapter.code_range={code_range}")
    suffix = "" if code_range == "narrow" else f"-{code_range}"
    return Trained(
        task, f"bayesian-lora-bits{bits:g}{_finer(group)}{suffix}", (*OURS, *grid, f"gates.budget=bits={bits:g}")
    )


def lora(task: str) -> Trained:
    """The LoRA run that all else of a task is compared with."""
    return Trained(task, "lora", ("method=lora",))


POINTS: tuple[Trained | Rounded, ...] = (
    *(lora(task) for task in TASKS),
    *(Rounded(task, bits) for bits in (None, 2, 2.5, 3, 3.5, 4) for task in TASKS),
    *(ours(task, bits, FINE_GROUP, "full") for bits in BUDGETS for task in TASKS),
    *(ours(task, bits, group) for group in (FINE_GROUP, GROUP) for bits in BUDGETS for task in TASKS),
    *(Rounded(task, bits, FINE_GROUP) for bits in BUDGETS for task in TASKS),
)
