"""What belongs to an SBoRA adapter: which matrix is one-hot, how much it picks, and who else may pick the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from peft import PeftConfig

from rankbits.tuners.peft_type import RankbitsPeftType, is_integer, names_as_sets


class Variant(str, Enum):
    """Which of LoRA's matrices is one-hot and frozen (Po et al. 2024): A picks inputs, B picks outputs."""

    FA = "fa"
    FB = "fb"


@dataclass
class SboraConfig(PeftConfig):
    """Configuration of an SBoRA adapter: the update of r columns (FA) or r rows (FB) of each weight.

    On a base in 4 bits this is QSBoRA; several adapters with `disjoint=True` in one base are Multi-SBoRA.

    Args:
        r: how many inputs (FA) or outputs (FB) of a layer are picked.
        alpha: the update is scaled by alpha / r.
        variant: "fa" freezes a one-hot A, picks inputs and trains B; "fb" freezes a one-hot B, picks outputs and
            trains A.
        target_modules: names or a regular expression of the linear layers to adapt, "all-linear", or None for the
            architecture's usual ones.
        exclude_modules: names or a regular expression of layers to leave out.
        dropout: dropout on the input of the trained matrix, in [0, 1).
        modules_to_save: modules trained and saved in full, such as a classification head.
        layers_to_transform: indices of the blocks to adapt.
        layers_pattern: name of the list of blocks, if it is an unusual one.
        init_weights: True starts at zero, where the model computes what its base does; False at small random values.
        seed: of the choice of rows or columns. Each layer has its own random order of them, drawn from this seed and
            the layer's name; what was chosen is saved with the adapter.
        disjoint: share no row or column with any other adapter of a layer: take those that none of them has, and keep
            them from adapters that come later. Adapters of the two variants always meet, so that they cannot be
            combined.
        first: place in each layer's random order from which the rows or columns are taken. Tasks that are trained apart
            with one seed stay disjoint if each begins where another ends: see `task_configs`.

    Raises:
        ValueError: all invalid fields together, each with its value and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "how many inputs or outputs of a layer are picked"})
    alpha: float = field(default=16.0, metadata={"help": "the update is scaled by alpha / r"})
    variant: str = field(default="fa", metadata={"help": "'fa' picks inputs, 'fb' picks outputs"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "linear layers to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave out"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the input of the trained matrix"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved in full"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "block indices to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of blocks"})
    init_weights: bool = field(default=True, metadata={"help": "True starts at zero, False at random"})
    seed: int = field(default=0, metadata={"help": "of the choice of rows or columns"})
    disjoint: bool = field(default=False, metadata={"help": "share no row or column with another adapter"})
    first: int = field(default=0, metadata={"help": "place in the random order to begin at"})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = RankbitsPeftType.SBORA
        names_as_sets(self)
        problems = self._problems()
        if problems:
            raise ValueError("SboraConfig: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        if not is_integer(self.r) or self.r < 1:
            problems.append(f"`r` must be a positive integer, got {self.r!r}")
        if self.alpha <= 0:
            problems.append(f"`alpha` must be > 0, got {self.alpha}")
        variants = [variant.value for variant in Variant]
        if self.variant not in variants:
            problems.append(f"`variant` must be one of {variants}, got {self.variant!r}")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"`dropout` must be in [0, 1), got {self.dropout}")
        if self.init_weights not in (True, False):
            problems.append(f"`init_weights` must be True or False, got {self.init_weights!r}")
        if not is_integer(self.seed):
            problems.append(f"`seed` must be an integer, got {self.seed!r}")
        if not is_integer(self.first) or self.first < 0:
            problems.append(f"`first` must be an integer >= 0, got {self.first!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("`layers_pattern` needs `layers_to_transform`")
        return problems


def task_configs(config: SboraConfig, ranks: Mapping[str, int]) -> dict[str, SboraConfig]:
    """Configurations for tasks that are trained apart, perhaps in several processes, and later meet in one base.

    Each task begins in every layer's random order where the one before it ends, so that no two share a row or column.
    A task keeps the ratio alpha / r of `config`.

    Args:
        config: what the tasks have in common, the seed among it.
        ranks: how many rows or columns each task gets.

    Raises:
        ValueError: a rank is below 1. Whether all fit is known once a layer is adapted.
    """
    scale = config.alpha / config.r
    configs: dict[str, SboraConfig] = {}
    first = config.first
    for task, rank in ranks.items():
        configs[task] = replace(config, r=rank, alpha=scale * rank, disjoint=True, first=first)
        first += rank
    return configs
