"""What belongs to a Bayesian-LoRA adapter: rank, targets, which tensors have quantizers, how it starts."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from enum import Enum

from peft import PeftConfig

from rankbits.gates.hard_concrete import OPEN_LOGIT
from rankbits.quant.grid import PER_TENSOR, Granularity, RangeLayout
from rankbits.quant.scales import SCALE_BITS
from rankbits.tuners.peft_type import RankbitsPeftType, is_integer, names_as_sets


class Site(str, Enum):
    """The tensors of an adapted linear layer that can have a quantizer (Bayesian-LoRA, Alg. 1).

    Those of an attention's probabilities belong to the layer that makes its values: they multiply its output.
    """

    WEIGHT = "weight"
    DOWN = "down"
    DIAGONAL = "diagonal"
    UP = "up"
    DOWN_OUTPUT = "down_output"
    DIAGONAL_OUTPUT = "diagonal_output"
    OUTPUT = "output"
    INPUT = "input"
    PROBABILITIES = "probabilities"


ACTIVATION_SITES = (Site.INPUT, Site.DOWN_OUTPUT, Site.DIAGONAL_OUTPUT, Site.OUTPUT, Site.PROBABILITIES)
"""Quantizers whose work no single weight can do."""
PAPER_SITES = tuple(site for site in Site if site not in {Site.INPUT, Site.PROBABILITIES})
"""The seven quantizers of the paper: W0, A, E, B and the outputs of A, of E and of the block."""


MERGED_SITES = (Site.WEIGHT, Site.OUTPUT, Site.INPUT)
"""The quantizers of a layer whose update lies inside the quantized weight."""


INPUT_GRANULARITIES = (Granularity.TENSOR.value, Granularity.GROUP.value)
"""Which elements of what a layer reads can share a range."""


class Operand(str, Enum):
    """What the output of a linear layer is in the products of an attention."""

    QUERIES = "queries"
    KEYS = "keys"
    VALUES = "values"


class Placement(str, Enum):
    """What the quantizer of the weight rounds: W0 beside a quantized update (the paper), or the sum of both."""

    SEPARATE = "separate"
    MERGED = "merged"


class GroupTie(str, Enum):
    """Which weights share one width: those that serving engines fuse into one matrix (q, k, v; gate and up)."""

    FUSED = "fused"


class Rounding(str, Enum):
    """Which codes a weight gets once its width is known."""

    NEAREST = "nearest"
    """The nearest ones, and the update learns through them."""
    COMPENSATED = "compensated"
    """Those with which the outputs of the layer move least: W0's as soon as its width is known, and a sum's after the
    last step, until which the update learns unrounded. A sum at 2 bits gets them when its width is known, too, and the
    update learns through them."""


class CodeRange(str, Enum):
    """How many of the codes of its width the grid of a weight has."""

    NARROW = "narrow"
    """As many below zero as above, 2^b - 1: the paper's grids, of which the finer ones contain the coarser ones."""
    FULL = "full"
    """All 2^b once the width is known; for each range the additional one lies where it helps more, below or above."""


class ActivationRanges(str, Enum):
    """Where the range of an activation lies when its width is known; it is trained from there on."""

    LARGEST = "largest"
    """Where it was while widths were judged: by evidence, at the largest magnitude of the warm-up."""
    FITTED = "fitted"
    """Where rounding the activations of the last passes before costs the least squared error."""
    AFFINE = "affine"
    """Fitted, and of what a layer reads also where the range begins: what lies there is a constant of the layer."""


class RankGate(str, Enum):
    """How a rank gate gets its value: rounded with a straight-through gradient, or sampled hard concrete."""

    STRAIGHT_THROUGH = "ste"
    HARD_CONCRETE = "hard_concrete"


class Start(str, Enum):
    """How A, E and B start; the update is zero for the first two."""

    LORA = "lora"
    ADALORA = "adalora"
    RANDOM = "random"


def start_of(init_weights: bool | str) -> Start:
    """The start that `init_weights` names: True is "lora", False is "random"; ValueError for an unknown name."""
    if isinstance(init_weights, bool):
        return Start.LORA if init_weights else Start.RANDOM
    return Start(init_weights)


@dataclass
class BayesianLoraConfig(PeftConfig):
    """Configuration of a Bayesian-LoRA adapter, W = W0 + B E A with gated rank and gated bit widths.

    Args:
        r: maximum rank of the update; gates may close all but the first.
        alpha: the update is scaled by alpha / r, with the maximum rank, however many ranks stay open.
        target_modules: names or a regular expression of the linear layers to adapt, "all-linear", or None for the
            architecture's usual ones.
        exclude_modules: names or a regular expression of layers to leave out.
        dropout: dropout on the input of A, in [0, 1).
        modules_to_save: modules trained and saved in full, such as a classification head.
        layers_to_transform: indices of the blocks to adapt.
        layers_pattern: name of the list of blocks, if it is an unusual one.
        init_weights: True or "lora" (A Kaiming-uniform, B zero, E one), "adalora" (A and B normal with standard
            deviation 0.02, E zero), False ("lora" with a normal B: not the identity).
        learn_bits: learn the bit width of each quantizer; False switches all quantizers off.
        learn_rank: learn the rank of each layer; False keeps r.
        rank_gate: "ste" (Alg. 1) or "hard_concrete" (Eqs. 12-13).
        quantizers: tensors to quantize, names of `Site`; None means the paper's seven, or weight and input where the
            placement is merged.
        placement: "separate" rounds W0 and the factors of the update, each on its own grid (Alg. 1); "merged" rounds
            the sum W0 + s B E A on one grid, so that merging is exact and the update can repair the rounding of W0.
        rounding: "nearest" codes for the weight, or "compensated" ones, by which errors of rounding cancel in the
            outputs (Frantar et al. 2023). The adapter then stores a byte for each number of the weight.
        code_range: "narrow" leaves a weight 2^b - 1 codes at b bits, 3 of 4 at 2 bits; "full" gives it all of them once
            its width is known, one more below zero or, where a step is negative, above it.
        scale_bits: bits that each step of the weight's grid is stored in once its width is known: 32, or 16 (half
            precision) or 8 (E4M3) with a power of two that the tensor shares.
        activation_ranges: where the range of each activation goes when its width is known: "largest" leaves it
            where it was, at the largest magnitude seen in the warm-up unless it was trained since; "fitted" takes the
            one with the least squared error in the last passes; with "affine" that of what a layer reads need not lie
            around zero: it has a low end besides, as formats with a zero point have.
        granularity: which elements of the weight share a range: "tensor", "channel" (a row) or "group" (consecutive
            inputs of a row). Factors of the update have one range each.
        input_granularity: which elements of what a layer reads share a range: "tensor", or "group", the consecutive
            inputs that are a group of the weight, too, in all rows. All other activations have one range each.
        group_size: elements of a group; it has to divide the inputs of every adapted layer.
        share_inputs: one quantizer for the input of layers that read the same tensor (q, k, v; gate and up).
        tie_groups: "fused" gives such layers one weight width, too, which fused serving kernels need.
        weight_gradient_rows: rows of a batch, drawn at random, from which the gradient of the weight's gates and ranges
            is estimated without bias; None takes all rows. The factors of the update always learn from all rows.
        sampled_share: share of the quantizers, drawn anew in each pass, whose width gates are sampled, in (0, 1]; the
            others stand as at inference. With 1 (the paper) all are noisy at once, and each hides what the others do.
        calibration_passes: training passes that only record ranges.
        quantize_attention: quantizers for both operands of both products of attention: queries, keys and values as the
            products read them (the outputs of their layers, after rotations and norms), and the probabilities of the
            softmax. In every block whose three projections are adapted; the model has to dispatch its attention
            through transformers' attention interface.
        quantize_head: quantizers for weight and input of every linear layer that is trained in full: those inside
            `modules_to_save` and in the head that PEFT trains unasked. Ranges of the weight go by `granularity`.
        initial_bit_logit: start of all bit-width gates; all must be open.
        initial_rank_logit: start of all rank gates; all r ranks must be open.
        hardened_ranks: written by `rankbits.harden`: layer name to its fixed rank.
        hardened_bits: written by `rankbits.harden`: layer name to site to its fixed width in bits.
        unsigned_inputs: written by `rankbits.harden`: layers whose input grid starts at zero, or at its low end.

    Raises:
        ValueError: all invalid fields together, each with its value and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "maximum rank of the update"})
    alpha: float = field(default=16.0, metadata={"help": "the update is scaled by alpha / r"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "linear layers to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave out"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the input of A"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved in full"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "block indices to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of blocks"})
    init_weights: bool | str = field(default=True, metadata={"help": "True, False, 'lora' or 'adalora'"})
    learn_bits: bool = field(default=True, metadata={"help": "learn bit widths"})
    learn_rank: bool = field(default=True, metadata={"help": "learn ranks"})
    rank_gate: str = field(default="ste", metadata={"help": "'ste' or 'hard_concrete'"})
    quantizers: list[str] | None = field(default=None, metadata={"help": "tensors that have a quantizer"})
    placement: str = field(default="separate", metadata={"help": "'separate' or 'merged'"})
    rounding: str = field(default="nearest", metadata={"help": "'nearest' or 'compensated'"})
    code_range: str = field(default="narrow", metadata={"help": "'narrow' or 'full'"})
    scale_bits: int = field(default=32, metadata={"help": "32, 16 or 8: bits of each scale of the weight"})
    activation_ranges: str = field(default="largest", metadata={"help": "'largest', 'fitted' or 'affine'"})
    granularity: str = field(default="tensor", metadata={"help": "'tensor', 'channel' or 'group'"})
    input_granularity: str = field(default="tensor", metadata={"help": "'tensor' or 'group'"})
    group_size: int = field(default=64, metadata={"help": "weights of a group that share a range"})
    share_inputs: bool = field(default=True, metadata={"help": "one quantizer for an input that several layers read"})
    tie_groups: str | None = field(default=None, metadata={"help": "'fused' or None"})
    weight_gradient_rows: int | None = field(default=None, metadata={"help": "rows for the weight's gate gradient"})
    sampled_share: float = field(default=1.0, metadata={"help": "share of the quantizers that are sampled in a pass"})
    calibration_passes: int = field(default=50, metadata={"help": "training passes that only record ranges"})
    quantize_attention: bool = field(
        default=False, metadata={"help": "quantizers for both operands of the attention products"}
    )
    quantize_head: bool = field(default=False, metadata={"help": "quantizers for the head that is trained in full"})
    initial_bit_logit: float = field(default=6.0, metadata={"help": "start of the bit-width gates"})
    initial_rank_logit: float = field(default=6.0, metadata={"help": "start of the rank gates"})
    hardened_ranks: dict[str, int] | None = field(default=None, metadata={"help": "written by harden"})
    hardened_bits: dict[str, dict[str, int]] | None = field(default=None, metadata={"help": "written by harden"})
    unsigned_inputs: list[str] | None = field(default=None, metadata={"help": "written by harden"})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = RankbitsPeftType.BAYESIAN_LORA
        self._operand: Operand | None = None
        names_as_sets(self)
        problems = [*self._number_problems(), *self._name_problems()]
        if problems:
            raise ValueError("BayesianLoraConfig: " + "; ".join(problems))

    def _number_problems(self) -> list[str]:
        problems = []
        if not is_integer(self.r) or self.r < 1:
            problems.append(f"`r` must be a positive integer, got {self.r!r}")
        if not 0.0 < self.alpha < math.inf:
            problems.append(f"`alpha` must be > 0 and finite, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"`dropout` must be in [0, 1), got {self.dropout}")
        if not is_integer(self.calibration_passes) or self.calibration_passes < 0:
            problems.append(f"`calibration_passes` must be an integer >= 0, got {self.calibration_passes}")
        if not is_integer(self.group_size) or self.group_size < 1:
            problems.append(f"`group_size` must be a positive integer, got {self.group_size}")
        if not is_integer(self.scale_bits) or self.scale_bits not in SCALE_BITS:
            problems.append(f"`scale_bits` must be one of {list(SCALE_BITS)}, got {self.scale_bits!r}")
        rows = self.weight_gradient_rows
        if rows is not None and (not is_integer(rows) or rows < 1):
            problems.append(f"`weight_gradient_rows` must be a positive integer or None, got {rows}")
        if not 0.0 < self.sampled_share <= 1.0:
            problems.append(f"`sampled_share` must be in (0, 1], got {self.sampled_share}")
        if self.initial_bit_logit <= OPEN_LOGIT:
            problems.append(
                f"`initial_bit_logit` must exceed {OPEN_LOGIT:.4f}, where gates open, got {self.initial_bit_logit}"
            )
        return problems

    def _name_problems(self) -> list[str]:
        problems = []
        gates = [gate.value for gate in RankGate]
        if self.rank_gate not in gates:
            problems.append(f"`rank_gate` must be one of {gates}, got {self.rank_gate!r}")
        elif (
            is_integer(self.r)
            and not self.hardened
            and not _all_ranks_start_open(self.rank_gate, self.initial_rank_logit, self.r)
        ):
            problems.append(
                f"`initial_rank_logit`={self.initial_rank_logit} leaves some of r={self.r} ranks closed at the start: "
                "raise it, or lower r"
            )
        if self.init_weights not in (True, False, Start.LORA.value, Start.ADALORA.value):
            problems.append(f"`init_weights` must be True, False, 'lora' or 'adalora', got {self.init_weights!r}")
        problems.extend(self._placement_problems())
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("`layers_pattern` needs `layers_to_transform`")
        return problems

    def _placement_problems(self) -> list[str]:
        problems = []
        names = (
            ("placement", Placement),
            ("rounding", Rounding),
            ("code_range", CodeRange),
            ("activation_ranges", ActivationRanges),
            ("granularity", Granularity),
            ("tie_groups", GroupTie),
        )
        for name, kind in names:
            value, known = getattr(self, name), [member.value for member in kind]
            if value not in known and not (name == "tie_groups" and value is None):
                problems.append(f"`{name}` must be one of {known}, got {value!r}")
        if self.input_granularity not in INPUT_GRANULARITIES:
            problems.append(
                f"`input_granularity` must be one of {list(INPUT_GRANULARITIES)}, got {self.input_granularity!r}"
            )
        elif self.input_granularity == Granularity.GROUP.value != self.granularity:
            problems.append(
                f"`input_granularity`='group' needs granularity='group', got {self.granularity!r}: with other ranges "
                "of the weight no product of codes has one scale"
            )
        merged = self.placement == Placement.MERGED.value
        sites = [site.value for site in (MERGED_SITES if merged else (*PAPER_SITES, Site.INPUT))]
        unknown = sorted(set(self.quantizers or ()) - set(sites))
        if unknown:
            where = " with placement='merged', which has no factors beside the weight" if merged else ""
            problems.append(f"`quantizers` has unknown names {unknown}; known are {sites}{where}")
        lacks_inputs = self.learn_bits and Site.INPUT not in self.sites and not self.quantize_head
        problems.extend(
            f"`{name}`={value!r} is about inputs, and no input has a quantizer: add 'input' to quantizers"
            for name, value in (("activation_ranges", "affine"), ("input_granularity", "group"))
            if lacks_inputs and getattr(self, name) == value
        )
        problems.extend(
            f"`{name}`=True needs learn_bits=True, without which nothing has a quantizer"
            for name in ("quantize_attention", "quantize_head")
            if getattr(self, name) and not self.learn_bits
        )
        if self.compensates and Site.WEIGHT not in self.sites:
            problems.append("`rounding`='compensated' needs a quantizer of the weight, which this adapter has not")
        if merged and self.dropout:
            problems.append(
                f"`dropout`={self.dropout} has no place with placement='merged', where the update is part of the "
                "weight: use dropout=0.0, or placement='separate'"
            )
        return problems

    @property
    def compensates(self) -> bool:
        """Whether codes of weights are offset from the nearest ones."""
        return self.rounding == Rounding.COMPENSATED.value

    @property
    def uses_all_codes(self) -> bool:
        """Whether grids of weights are full once their width is known."""
        return self.code_range == CodeRange.FULL.value

    @property
    def fits_activations(self) -> bool:
        """Whether ranges of activations are fitted once their width is known."""
        return self.activation_ranges != ActivationRanges.LARGEST.value

    @property
    def has_affine_inputs(self) -> bool:
        """Whether ranges of what layers read begin at low ends of their own once they are fitted."""
        return self.activation_ranges == ActivationRanges.AFFINE.value

    @property
    def range_layout(self) -> RangeLayout:
        """Which elements of the weight share a range, and how its scales are stored."""
        return RangeLayout(Granularity(self.granularity), self.group_size, self.scale_bits)

    def layout_of(self, site: Site) -> RangeLayout:
        """Which elements of the tensor at a site share a range."""
        if site is Site.WEIGHT:
            return self.range_layout
        grouped = site is Site.INPUT and self.input_granularity == Granularity.GROUP.value
        return RangeLayout(Granularity.GROUP, self.group_size) if grouped else PER_TENSOR

    @property
    def hardened(self) -> bool:
        """Whether ranks and widths are fixed."""
        return self.hardened_ranks is not None

    @property
    def learns(self) -> bool:
        """Whether the adapter has gates, and so needs a schedule."""
        return (self.learn_bits or self.learn_rank) and not self.hardened

    @property
    def sites(self) -> tuple[Site, ...]:
        """The quantizers of a layer on an unquantized base, in the fixed order of `Site`."""
        if not self.learn_bits:
            return ()
        chosen = {site for site in Site if site.value in (self.quantizers or ())}
        if self.quantizers is None:
            chosen = {Site.WEIGHT, Site.INPUT} if self.placement == Placement.MERGED.value else set(PAPER_SITES)
        if self._operand is not None:
            chosen.add(Site.OUTPUT)
        if self._operand is Operand.VALUES:
            chosen.add(Site.PROBABILITIES)
        return tuple(site for site in Site if site in chosen)

    @property
    def operand(self) -> Operand | None:
        """What the output of the layer that this configuration is for is in a quantized attention; None elsewhere."""
        return self._operand

    def of_operand(self, operand: Operand) -> BayesianLoraConfig:
        """The configuration of one layer: of the queries, keys or values of an attention that is quantized."""
        own = copy.copy(self)
        own._operand = operand
        return own


def _all_ranks_start_open(rank_gate: str, logit: float, rank: int) -> bool:
    if rank_gate == RankGate.HARD_CONCRETE.value:
        return logit > OPEN_LOGIT
    # The last gate is the rounded product of all r - 1 probabilities.
    probability = 1.0 / (1.0 + math.exp(-logit))
    return bool(probability ** (rank - 1) > 0.5)
