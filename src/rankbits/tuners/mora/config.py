"""What belongs to a MoRA adapter: the rank it is budgeted by, targets, how it compresses and decompresses."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from rankbits.tuners.mora.side import Rounding
from rankbits.tuners.mora.update import BLOCKWISE, NUMBERED, MoraType
from rankbits.tuners.peft_type import RankbitsPeftType, is_integer, names_as_sets

ROTATION_BELOW = 64
"""Below this rank rotation is the usual type, from it on sharing: each group is small then."""


@dataclass
class MoraConfig(PeftConfig):
    """Configuration of a MoRA adapter, h = W0 x + f_decomp(M f_comp(x)) with a square matrix M (Jiang et al. 2024).

    There is no alpha: the update is not scaled.

    Args:
        r: rank of the LoRA that has as many parameters; M has side sqrt(r (inputs + outputs)) in every layer, which
            must not exceed the smaller of inputs and outputs.
        mora_type: what compresses and decompresses: "truncation", "sharing" (the paper's code: 1), "sharing_adjacent"
            (2), "sharing_adjacent_inputs" (3), "sharing_adjacent_outputs" (4), "decoupling" or "rotation" (6). None
            means "rotation" below rank 64 and "sharing" from it on. A number is stored as the name it stands for.
        rounding: "nearest" (the paper's code) or "floor" (the paper: never more parameters than LoRA).
        fold: "decoupling" and "rotation" put as many results one behind the other as there are inputs. Where a layer
            has fewer outputs the rest is cut off, as in the paper's code, and the inputs that it was made of are
            never read; True adds it to the first outputs instead.
        target_modules: names or a regular expression of the linear layers to adapt, "all-linear", or None for the
            architecture's usual ones.
        exclude_modules: names or a regular expression of layers to leave out.
        dropout: dropout on the input of the update, in [0, 1).
        modules_to_save: modules trained and saved in full, such as a classification head.
        layers_to_transform: indices of the blocks to adapt.
        layers_pattern: name of the list of blocks, if it is an unusual one.
        init_weights: True starts M at zero, where the model is unchanged; False draws it as `nn.Linear` does.

    Raises:
        ValueError: all invalid fields together, each with its value and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "rank of the LoRA with as many parameters"})
    mora_type: str | int | None = field(default=None, metadata={"help": "what compresses and decompresses"})
    rounding: str = field(default="nearest", metadata={"help": "'nearest' or 'floor'"})
    fold: bool = field(default=False, metadata={"help": "add results beyond the outputs instead of cutting them off"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "linear layers to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave out"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the input of the update"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved in full"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "block indices to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of blocks"})
    init_weights: bool = field(default=True, metadata={"help": "True starts at the base model"})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = RankbitsPeftType.MORA
        names_as_sets(self)
        problems = [*self._number_problems(), *self._name_problems()]
        if problems:
            raise ValueError("MoraConfig: " + "; ".join(problems))

    def _number_problems(self) -> list[str]:
        problems = []
        if not is_integer(self.r) or self.r < 1:
            problems.append(f"`r` must be a positive integer, got {self.r!r}")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"`dropout` must be in [0, 1), got {self.dropout}")
        if self.init_weights not in {True, False}:
            problems.append(f"`init_weights` must be True or False, got {self.init_weights!r}")
        return problems

    def _name_problems(self) -> list[str]:
        problems = []
        if type(self.mora_type) is int and self.mora_type in NUMBERED:
            self.mora_type = NUMBERED[self.mora_type].value
        names = [kind.value for kind in MoraType]
        if self.mora_type is not None and self.mora_type not in names:
            problems.append(f"`mora_type` must be one of {names}, {sorted(NUMBERED)} or None, got {self.mora_type!r}")
        elif self.fold and self.kind not in BLOCKWISE:
            kinds = sorted(kind.value for kind in BLOCKWISE)
            problems.append(f"`fold` is only for the types {kinds}, not for {self.kind.value!r}")
        roundings = [rounding.value for rounding in Rounding]
        if self.rounding not in roundings:
            problems.append(f"`rounding` must be one of {roundings}, got {self.rounding!r}")
        if self.layers_pattern and not self.layers_to_transform:
            problems.append("`layers_pattern` needs `layers_to_transform`")
        return problems

    @property
    def kind(self) -> MoraType:
        """The type, the usual one for the rank where none was chosen."""
        if self.mora_type is None:
            return MoraType.ROTATION if self.r < ROTATION_BELOW else MoraType.SHARING
        return MoraType(self.mora_type)
