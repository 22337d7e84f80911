"""A linear layer with DyLoRA adapters: nested low-rank updates, of which any leading part can run alone."""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankbits.errors import RankbitsWarning
from rankbits.tuners.dylora.config import DyloraConfig, TrainMode
from rankbits.tuners.linear import AdapterLinear
from rankbits.tuners.peft_type import is_integer

UNSCHEDULED_PASSES = 100
"""Training passes without a drawn rank after which a layer says so."""
WEIGHT_STANDARD_DEVIATION = 0.02


class DyloraLinear(AdapterLinear):
    """y = x W0^T + bias + (alpha / b) dropout(x) A[:b]^T B[:, :b]^T (Valipour et al. 2022, Algorithm 1).

    b is the rank of the present training step, which a schedule sets, or the evaluation rank where there is none and
    outside training. It never changes within a pass, so that passes recomputed by gradient checkpointing use it too.
    """

    adapter_layer_names = ("dylora_down", "dylora_up")
    other_param_names = (
        "dylora_dropout",
        "r",
        "alpha",
        "train_mode",
        "strict",
        "evaluation_rank",
        "sampled_rank",
        "before_step",
        "unscheduled_passes",
    )

    dylora_down: nn.ParameterDict
    dylora_up: nn.ParameterDict
    dylora_dropout: nn.ModuleDict

    def create_containers(self) -> None:
        """Create the empty per-adapter containers."""
        self.dylora_down = nn.ParameterDict()
        self.dylora_up = nn.ParameterDict()
        self.dylora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.train_mode: dict[str, TrainMode] = {}
        self.strict: dict[str, bool] = {}
        self.evaluation_rank: dict[str, int] = {}
        self.sampled_rank: dict[str, int | None] = {}
        self.before_step: dict[str, tuple[Tensor, Tensor]] = {}
        self.unscheduled_passes: dict[str, int] = {}

    def update_layer(self, adapter_name: str, config: DyloraConfig, key: str) -> None:
        """Add one adapter.

        Args:
            adapter_name: its name.
            config: its configuration.
            key: qualified name of this layer in the base model.

        Raises:
            ValueError: r exceeds what the matrix can have.
        """
        shape = (self.out_features, self.in_features)
        if config.r > min(shape):
            raise ValueError(
                f"`r`={config.r} exceeds the rank that {key!r} can have: its weight is {list(shape)}, so r <= "
                f"{min(shape)}"
            )
        self.r[adapter_name] = config.r
        self.alpha[adapter_name] = config.alpha
        self.train_mode[adapter_name] = TrainMode(config.train_mode)
        self.strict[adapter_name] = config.strict
        self.evaluation_rank[adapter_name] = config.r if config.evaluation_rank is None else config.evaluation_rank
        self.sampled_rank[adapter_name] = None
        self.before_step.pop(adapter_name, None)
        self.unscheduled_passes[adapter_name] = 0
        self.dylora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.dylora_down[adapter_name] = nn.Parameter(torch.empty(config.r, self.in_features))
        self.dylora_up[adapter_name] = nn.Parameter(torch.zeros(self.out_features, config.r))
        nn.init.kaiming_uniform_(self.dylora_down[adapter_name], a=math.sqrt(5))
        if not config.init_weights:
            nn.init.normal_(self.dylora_up[adapter_name], std=WEIGHT_STANDARD_DEVIATION)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapted_forward(self, x: Tensor) -> Tensor:
        """Output with the active adapters: [..., in_features] to [..., out_features]."""
        result: Tensor = self.base_layer(x)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name in self.dylora_down:
                result = result + self._update(name, x).to(result.dtype)
        return result

    def _update(self, adapter_name: str, x: Tensor) -> Tensor:
        """The scaled update of the rank in use: [..., in_features] to [..., out_features]."""
        if self.training and self.sampled_rank[adapter_name] is None:
            self._count_unscheduled(adapter_name)
        rank = self.rank_in_use(adapter_name)
        down, up = self._leading(adapter_name, rank)
        if self._trains_last_only(adapter_name):
            last = rank - 1
            down = torch.cat([down[:last].detach(), down[last:]])  # [b, in_features]
            up = torch.cat([up[:, :last].detach(), up[:, last:]], dim=1)  # [out_features, b]
        x = self.dylora_dropout[adapter_name](self._cast_input_dtype(x, down.dtype))
        return F.linear(F.linear(x, down), up) * (self.alpha[adapter_name] / rank)  # [..., out_features]

    def rank_in_use(self, adapter_name: str) -> int:
        """The rank of the present training step, else the evaluation rank."""
        sampled = self.sampled_rank[adapter_name]
        return sampled if self.training and sampled is not None else self.evaluation_rank[adapter_name]

    def _leading(self, adapter_name: str, rank: int) -> tuple[Tensor, Tensor]:
        """A[:b] and B[:, :b]; what is cut off gets a zero gradient, not none."""
        return self.dylora_down[adapter_name][:rank], self.dylora_up[adapter_name][:, :rank]

    def _trains_last_only(self, adapter_name: str) -> bool:
        sampled = self.training and self.sampled_rank[adapter_name] is not None
        return sampled and self.train_mode[adapter_name] is TrainMode.FROZEN

    def _count_unscheduled(self, adapter_name: str) -> None:
        self.unscheduled_passes[adapter_name] += 1
        if self.unscheduled_passes[adapter_name] == UNSCHEDULED_PASSES:
            warnings.warn(
                f"{UNSCHEDULED_PASSES} training passes without a drawn rank: DyLoRA trains as plain LoRA of rank "
                f"{self.evaluation_rank[adapter_name]}, and smaller ranks will be poor. Add DyloraCallback() to the "
                "Trainer's callbacks, or make a DyloraSchedule(model) and call its step() after each optimizer step",
                RankbitsWarning,
                stacklevel=2,
            )

    def begin_step(self, adapter_name: str, rank: int) -> None:
        """Train with this rank until `end_step`.

        Args:
            adapter_name: which adapter.
            rank: the rank drawn for one optimizer step, in 1..r.
        """
        self.sampled_rank[adapter_name] = rank
        if self.strict[adapter_name]:
            factors = (self.dylora_down[adapter_name], self.dylora_up[adapter_name])
            self.before_step[adapter_name] = (factors[0].detach().clone(), factors[1].detach().clone())

    @torch.no_grad()
    def end_step(self, adapter_name: str) -> None:
        """End the step: put back, bit for bit, the rows and columns it did not train, and leave the drawn rank.

        A layer that has not begun a step stays as it is.
        """
        rank = self.sampled_rank[adapter_name]
        self.sampled_rank[adapter_name] = None
        if rank is None or adapter_name not in self.before_step:
            return
        first = rank - 1 if self.train_mode[adapter_name] is TrainMode.FROZEN else 0
        down, up = self.dylora_down[adapter_name], self.dylora_up[adapter_name]
        old_down, old_up = self.before_step.pop(adapter_name)
        for old, new in ((old_down, down), (old_up.T, up.T)):
            new[:first].copy_(old[:first])
            new[rank:].copy_(old[rank:])

    def lora_factors(self, adapter_name: str, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
        """The plain LoRA adapter that equals this one at a rank, with r = b and lora_alpha = alpha.

        Args:
            adapter_name: which adapter.
            rank: b in 1..r; None is the evaluation rank.

        Returns:
            Copies of A [b, in_features] and B [out_features, b], and the scale alpha / b: the update of
            x [..., in_features] is scale * x A^T B^T.

        Raises:
            ValueError: the rank is not in 1..r.
        """
        rank = self.evaluation_rank[adapter_name] if rank is None else rank
        check_rank(rank, self.r[adapter_name], adapter_name)
        down, up = self._leading(adapter_name, rank)
        return down.detach().clone(), up.detach().clone(), self.alpha[adapter_name] / rank

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Every DyLoRA adapter can be merged, at its evaluation rank."""

    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        """W0 + (alpha / b) B[:, :b] A[:b] at the evaluation rank b: [out_features, in_features], float32."""
        down, up, scaling = self.lora_factors(adapter_name)
        return weight + scaling * (up.to(torch.float32) @ down.to(torch.float32))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is all the adapter does."""
        return True


def check_rank(rank: int, largest: int, adapter_name: str) -> None:
    """Raise ValueError if a rank is not one of 1..largest."""
    if not is_integer(rank) or not 1 <= rank <= largest:
        raise ValueError(
            f"rank must be an integer in [1, {largest}], the largest rank of adapter {adapter_name!r}, got {rank!r}"
        )
