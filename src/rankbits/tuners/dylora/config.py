"""What belongs to a DyLoRA adapter: its largest rank, its targets, which rows a step trains, the rank it is used at."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from peft import PeftConfig

from rankbits.tuners.peft_type import RankbitsPeftType, is_integer, names_as_sets


class TrainMode(str, Enum):
    """What a step that drew rank b trains: row b of A and column b of B alone, or all up to b (Valipour et al.)."""

    FROZEN = "frozen"
    PREFIX = "prefix"


@dataclass
class DyloraConfig(PeftConfig):
    """Configuration of a DyLoRA adapter, W = W0 + (alpha / b) B[:, :b] A[:b] for any b up to r.

    Valipour et al. 2022, "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
    Adaptation". The rank of each training step is drawn by `rankbits.DyloraSchedule`, or by
    `rankbits.DyloraCallback` under a Trainer; without either the adapter trains as plain LoRA.

    Args:
        r: largest rank; after training every rank from 1 to r can be used.
        alpha: the update is scaled by alpha / b at rank b.
        target_modules: names or a regular expression of the linear layers to adapt, "all-linear", or None for the
            architecture's usual ones.
        exclude_modules: names or a regular expression of layers to leave out.
        dropout: dropout on the input of A, in [0, 1).
        modules_to_save: modules trained and saved in full, such as a classification head.
        layers_to_transform: indices of the blocks to adapt.
        layers_pattern: name of the list of blocks, if it is an unusual one.
        init_weights: True (A Kaiming-uniform, B zero: the identity), or False (B normal with standard deviation 0.02).
        train_mode: what a step that drew rank b trains: "frozen" row b of A and column b of B alone, "prefix" all b.
        strict: put rows and columns that a step did not train back after it. Their gradient is zero, but the momentum
            and weight decay of an optimizer would still move them. Costs a second copy of A and B during training.
        evaluation_rank: the rank outside training, of merging and of export; None is r. `rankbits.set_rank` writes it.

    Raises:
        ValueError: all invalid fields together, each with its value and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "largest rank of the update"})
    alpha: float = field(default=16.0, metadata={"help": "the update of rank b is scaled by alpha / b"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "linear layers to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave out"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the input of A"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved in full"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "block indices to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of blocks"})
    init_weights: bool = field(default=True, metadata={"help": "whether the update starts at zero"})
    train_mode: str = field(default="frozen", metadata={"help": "'frozen' or 'prefix'"})
    strict: bool = field(default=True, metadata={"help": "put back what a step did not train"})
    evaluation_rank: int | None = field(default=None, metadata={"help": "rank outside training; None is r"})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = RankbitsPeftType.DYLORA
        names_as_sets(self)
        problems = self._problems()
        if problems:
            raise ValueError("DyloraConfig: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        modes = [mode.value for mode in TrainMode]
        if not is_integer(self.r) or self.r < 1:
            problems.append(f"`r` must be a positive integer, got {self.r!r}")
        largest, rank = self.r if is_integer(self.r) else 1, self.evaluation_rank
        if rank is not None and not (is_integer(rank) and 1 <= rank <= max(1, largest)):
            problems.append(f"`evaluation_rank` must be in [1, r={self.r}] or None, got {rank!r}")
        if self.alpha <= 0:
            problems.append(f"`alpha` must be > 0, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"`dropout` must be in [0, 1), got {self.dropout}")
        if self.init_weights not in (True, False):
            problems.append(f"`init_weights` must be True or False, got {self.init_weights!r}")
        if self.train_mode not in modes:
            problems.append(f"`train_mode` must be one of {modes}, got {self.train_mode!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("`layers_pattern` needs `layers_to_transform`")
        return problems
