"""What belongs to a bottleneck adapter: its kind, its place, its width, its non-linearity, how it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from peft import PeftConfig

from rankbits.tuners.peft_type import RankbitsPeftType, is_integer, names_as_sets


class Kind(str, Enum):
    """Where an adapter reads: its sub-layer's output, the residual sum behind it, or its sub-layer's input."""

    HOULSBY = "houlsby"
    PFEIFFER = "pfeiffer"
    PARALLEL = "parallel"


class NonLinearity(str, Enum):
    """What stands between the two matrices of an adapter."""

    RELU = "relu"
    SWISH = "swish"
    GELU = "gelu"
    TANH = "tanh"


class Start(str, Enum):
    """How an adapter starts: without effect, nearly so (Houlsby et al. 2019, section 2.1), or with one."""

    ZERO = "zero"
    NORMAL = "normal"
    RANDOM = "random"


USUAL_NON_LINEARITY = {
    Kind.HOULSBY: NonLinearity.SWISH,
    Kind.PFEIFFER: NonLinearity.RELU,
    Kind.PARALLEL: NonLinearity.RELU,
}
USUAL_SCALING = {Kind.HOULSBY: 1.0, Kind.PFEIFFER: 1.0, Kind.PARALLEL: 4.0}
USUAL_FRACTION = {Kind.HOULSBY: 16, Kind.PFEIFFER: 16, Kind.PARALLEL: 2}
"""A bottleneck is this many times narrower than what its adapter writes to, if no width is given."""
FEED_FORWARD_KEYS = frozenset({"output", "input", "norm_before", "norm_after"})


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of bottleneck adapters, adapter(h) = c (U f(D h + b_D) + b_U).

    - "houlsby" (Houlsby et al. 2019): h <- h + adapter(h) on what attention and feed-forward add to the residual.
    - "pfeiffer" (Pfeiffer et al. 2021): on the feed-forward alone, h <- h + adapter(v), where v is the residual sum
      h + q, normalized if the model normalizes it (BERT), as it is if it does not (Llama).
    - "parallel" (He et al. 2022): beside the feed-forward, h <- h + adapter(x), x its input.

    All stand on the last linear layer of the sub-layer, before its dropout and before the residual is added.

    Args:
        kind: "houlsby", "pfeiffer" or "parallel".
        bottleneck_size: width m of the bottleneck; None is 1/16 of the hidden size, 1/2 for parallel.
        non_linearity: "relu", "swish", "gelu" or "tanh"; None is swish for Houlsby and relu for the others.
        scaling: c; None is 4 for parallel and 1 for the others.
        use_biases: whether D and U have biases.
        dropout: dropout behind the non-linearity, in [0, 1).
        target_modules: the linear layers that end the sub-layers to adapt, by names or a regular expression; None takes
            those of the architecture. A parallel adapter on layers named here takes the input of each layer itself,
            unless `feed_forward` says otherwise.
        feed_forward: for Pfeiffer's and parallel adapters of architectures that are not known: paths inside one block,
            of the linear layer that ends the feed-forward ("output"), of one that reads its input ("input"), and of
            the norm that the residual enters before it ("norm_before") or whose input is the residual sum behind it
            ("norm_after"). Filled in for architectures that are known.
        exclude_modules: names or a regular expression of layers to leave out.
        modules_to_save: modules trained and saved in full, such as a classification head.
        layers_to_transform: indices of the blocks to adapt.
        layers_pattern: name of the list of blocks, if it is an unusual one.
        train_layernorm: train the norms of the blocks too, as Houlsby et al. do, as copies that belong to the adapter.
        init_weights: True or "zero" (U zero: the identity), "normal" (D and U normal with standard deviation 0.02:
            nearly the identity, as in the papers), False (D and U Kaiming-uniform: not the identity).

    Raises:
        ValueError: all invalid fields together, each with its value and what is allowed.
    """

    kind: str = field(default="houlsby", metadata={"help": "'houlsby', 'pfeiffer' or 'parallel'"})
    bottleneck_size: int | None = field(default=None, metadata={"help": "width of the bottleneck"})
    non_linearity: str | None = field(default=None, metadata={"help": "'relu', 'swish', 'gelu' or 'tanh'"})
    scaling: float | None = field(default=None, metadata={"help": "factor of what the adapter adds"})
    use_biases: bool = field(default=True, metadata={"help": "whether both matrices have biases"})
    dropout: float = field(default=0.0, metadata={"help": "dropout behind the non-linearity"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "ends of sub-layers to adapt"})
    feed_forward: dict[str, str] | None = field(default=None, metadata={"help": "parts of a feed-forward, in a block"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave out"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved in full"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "block indices to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of blocks"})
    train_layernorm: bool = field(default=False, metadata={"help": "train the norms of the blocks too"})
    init_weights: bool | str = field(default=True, metadata={"help": "True, 'zero', 'normal' or False"})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = RankbitsPeftType.BOTTLENECK
        names_as_sets(self)
        problems = [*self._number_problems(), *self._name_problems(), *self._place_problems()]
        if problems:
            raise ValueError("BottleneckConfig: " + "; ".join(problems))

    def _number_problems(self) -> list[str]:
        problems = []
        size = self.bottleneck_size
        if size is not None and (not is_integer(size) or size < 1):
            problems.append(f"`bottleneck_size` must be a positive integer or None, got {size!r}")
        if self.scaling is not None and self.scaling <= 0:
            problems.append(f"`scaling` must be > 0 or None, got {self.scaling}")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"`dropout` must be in [0, 1), got {self.dropout}")
        return problems

    def _name_problems(self) -> list[str]:
        problems = []
        kinds, functions = [kind.value for kind in Kind], [function.value for function in NonLinearity]
        if self.kind not in kinds:
            problems.append(f"`kind` must be one of {kinds}, got {self.kind!r}")
        if self.non_linearity is not None and self.non_linearity not in functions:
            problems.append(f"`non_linearity` must be one of {functions} or None, got {self.non_linearity!r}")
        if self.init_weights not in (True, False, Start.ZERO.value, Start.NORMAL.value):
            problems.append(f"`init_weights` must be True, 'zero', 'normal' or False, got {self.init_weights!r}")
        return problems

    def _place_problems(self) -> list[str]:
        problems = []
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("`layers_pattern` needs `layers_to_transform`")
        if self.train_layernorm and self.kind != Kind.HOULSBY.value:
            problems.append(f"`train_layernorm` belongs to kind='houlsby', got kind={self.kind!r}")
        if self.feed_forward is None:
            return problems
        given = set(self.feed_forward)
        if self.kind == Kind.HOULSBY.value:
            problems.append("`feed_forward` belongs to kind='pfeiffer' and kind='parallel': name `target_modules`")
        if given - FEED_FORWARD_KEYS or not {"output", "input"} <= given:
            problems.append(
                f"`feed_forward` needs the keys 'output' and 'input', and may have {sorted(FEED_FORWARD_KEYS)}, got "
                f"{sorted(given)}"
            )
        if self.kind == Kind.PFEIFFER.value and len(given & {"norm_before", "norm_after"}) != 1:
            problems.append(
                f"`feed_forward` of kind='pfeiffer' needs either 'norm_before' or 'norm_after', got {sorted(given)}"
            )
        return problems

    @property
    def start(self) -> Start:
        """The start that `init_weights` names."""
        if isinstance(self.init_weights, bool):
            return Start.ZERO if self.init_weights else Start.RANDOM
        return Start(self.init_weights)
