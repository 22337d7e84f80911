"""What is counted: the parts of a model by name and size, and the method that adapts it. No weights, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from rankbits.records.costs import ScaleBits


class Rows(str, Enum):
    """Which rows a part works on."""

    TOKENS = "tokens"
    """The tokens that are computed: `query_len` of each sequence."""
    SOURCE = "source"
    """The tokens of the encoder, where there are two stacks; none once their keys and values are cached."""
    SEQUENCES = "sequences"
    """One row per sequence: a pooler, a classification head."""
    POSITIONS = "positions"
    """The rows of a relative-position table only (`position_rows`), once per batch."""
    HEAD = "head"
    """The positions a language-model head is asked for."""


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T + b, W of shape [d_out, d_in].

    Args:
        name: qualified name, as in the model's state dict.
        position_rows: rows of a relative-position table that the same weight also projects, once per batch.
        position_op: how that product is called, pos_key or pos_query.
        op: linear, or head for the output head, which no "all-linear" target reaches.
        tied_to: name of the table that the weight is shared with: no parameters of its own.
    """

    name: str
    d_in: int
    d_out: int
    bias: bool = True
    rows: Rows = Rows.TOKENS
    position_rows: int = 0
    position_op: str = ""
    op: str = "linear"
    tied_to: str | None = None


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution over a grid of positions.

    Args:
        kernel: its extent along each axis.
        positions: output positions per sequence, or input positions where it is transposed; 0: one per token.
        groups: groups that channels fall into.
    """

    name: str
    c_in: int
    c_out: int
    kernel: tuple[int, ...]
    positions: int = 0
    groups: int = 1
    bias: bool = True
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A look-up table: parameters and bytes, never MACs."""

    name: str
    entries: int
    width: int


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm (with bias) or RMSNorm (without)."""

    name: str
    width: int
    bias: bool = True
    rows: Rows = Rows.TOKENS
    position_rows: int = 0


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise function between two linear layers; `gated` multiplies by a second projection."""

    name: str
    width: int
    gated: bool = False
    rows: Rows = Rows.TOKENS


@dataclass(frozen=True, slots=True)
class Attention:
    """The products of activations inside attention: scores q k^T and context p v.

    Args:
        name: qualified name of the module that runs them.
        queries, keys, values: names of the linear layers whose outputs are the operands.
        heads, key_heads, head_dim: grouped-query attention shares keys and values, which leaves scores as they are.
        rows: whose queries.
        over: whose keys and values: SOURCE makes it cross-attention.
        causal: whether later keys are masked.
        window: keys a query sees at most.
        rotary: whether positions rotate q and k, which takes them off any grid they were quantized to.
        position_rows: rows of DeBERTa's relative positions, each compared with every query and every key.
        c2p, p2c: which of the two comparisons run.
    """

    name: str
    queries: str
    keys: str
    values: str
    heads: int
    key_heads: int
    head_dim: int
    rows: Rows = Rows.TOKENS
    over: Rows = Rows.TOKENS
    causal: bool = False
    window: int | None = None
    rotary: bool = False
    position_rows: int = 0
    c2p: bool = False
    p2c: bool = False


Part = Linear | Convolution | Table | Norm | Activation | Attention


@dataclass(frozen=True)
class ModelShape:
    """A model as its parts, in the order they run.

    Args:
        name: what the user called it.
        model_type: the architecture, as transformers names it.
        parts: all parts, with the names that the live model gives them.
        hidden: width of the residual stream.
        layers: blocks of all stacks together.
        max_length: tokens it has positions for; None where any number is allowed.
        vocabulary: entries of the token table.
        usual_targets: last names of the layers that adapters usually go to (q and v, as PEFT's table has it).
        stored_bits: width of a weight in the published files.
        decoder: whether it generates: it then has a cache and a language-model head.
        two_stacks: whether it has an encoder and a decoder.
    """

    name: str
    model_type: str
    parts: tuple[Part, ...]
    hidden: int
    layers: int
    max_length: int | None
    vocabulary: int
    usual_targets: tuple[str, ...]
    stored_bits: int = 32
    decoder: bool = False
    two_stacks: bool = False

    def linears(self) -> tuple[Linear, ...]:
        """All linear layers, heads included."""
        return tuple(part for part in self.parts if isinstance(part, Linear))

    def attentions(self) -> tuple[Attention, ...]:
        """All attentions."""
        return tuple(part for part in self.parts if isinstance(part, Attention))


class Method(str, Enum):
    """The family, by the names that recipes use."""

    FULL = "full"
    TOP_LAYER = "top-layer"
    FEATURE_BASED = "feature-based"
    HOULSBY = "houlsby"
    PFEIFFER = "pfeiffer"
    PARALLEL = "parallel"
    PREFIX = "prefix"
    PROMPT = "prompt"
    LORA = "lora"
    RSLORA = "rslora"
    ADALORA = "adalora"
    DYLORA = "dylora"
    QLORA = "qlora"
    DORA = "dora"
    QDORA = "qdora"
    MORA = "mora"
    SBORA_FA = "sbora-fa"
    SBORA_FB = "sbora-fb"
    QSBORA_FA = "qsbora-fa"
    QSBORA_FB = "qsbora-fb"
    MULTI_SBORA = "multi-sbora"
    BAYESIAN_LORA = "bayesian-lora"


class Placement(str, Enum):
    """What the quantizer of a weight rounds (Bayesian-LoRA)."""

    SEPARATE = "separate"
    """W0, beside an update with quantizers of its own."""
    MERGED = "merged"
    """The sum of W0 and the update: merging is exact, and nothing runs beside the weight at inference."""


class Granularity(str, Enum):
    """Which elements of a weight share a range."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"


@dataclass(frozen=True, slots=True)
class MoraForm:
    """What decides the side of MoRA's matrix and how often it runs (Jiang et al. 2024, section 4).

    Args:
        kind: what compresses and decompresses, by the names that recipes use; None is rotation below rank 64 and
            sharing from it on.
        floor: round the side down instead of to the nearest integer.
        fold: blockwise kinds multiply blocks whose results lie beyond the outputs, too.
    """

    kind: str | None = None
    floor: bool = False
    fold: bool = False


@dataclass(frozen=True)
class MethodSpec:
    """One method with the sizes that decide its cost.

    Args:
        method: which.
        rank: allocated rank r; side of the budget for MoRA; size of a bottleneck is `width`.
        targets: last names of layers, a regular expression, or "all-linear"; None takes the model's usual ones.
        ranks: active rank per layer name where it differs from `rank` (learned, pruned or chosen).
        widths: learned or assumed bits per layer name and site (weight, down, diagonal, up, down_output,
            diagonal_output, output, input, probabilities); absent is 32.
        sites: sites that have a quantizer (Bayesian-LoRA).
        learn_rank: whether ranks have gates (Bayesian-LoRA).
        placement: what the weight's quantizer rounds (Bayesian-LoRA).
        compensated: codes of weights have offsets from the nearest ones, a byte each (Bayesian-LoRA).
        all_codes: grids of weights are full: a byte for each of their ranges, while these learn (Bayesian-LoRA).
        scale_bits: bits that each scale of a weight is stored in (Bayesian-LoRA).
        granularity: which elements of the weight share a range (Bayesian-LoRA).
        input_granularity: the same of what a layer reads: tensor or group; all other tensors have one (Bayesian-LoRA).
        affine_inputs: ranges of what a layer reads have low ends of their own, which are stored too (Bayesian-LoRA).
        group_size: consecutive inputs that share a range, where ranges go by groups.
        share_inputs: layers that read the same tensor have one quantizer for it (Bayesian-LoRA).
        tie_groups: such layers have one weight width, too (Bayesian-LoRA).
        quantize_attention: attentions with adapted queries, keys and values have quantizers for the operands of both
            their products: the outputs of these layers, where the products read them, and the probabilities
            (Bayesian-LoRA).
        quantize_head: linear layers that are trained in full have quantizers for weight and input (Bayesian-LoRA).
        weight_gradient_rows: rows of a batch that the gradient of the weight's gates and ranges is estimated from; None
            is all of them (Bayesian-LoRA).
        mora: how MoRA compresses.
        width: bottleneck width, or None for the method's usual fraction of the hidden size.
        virtual_tokens: length of a prefix or prompt.
        trained_in_full: last names of modules trained and saved in full, such as a classifier.
        layers: blocks trained by top-layer fine-tuning, counted from the top, besides the head.
    """

    method: Method
    rank: int = 8
    targets: tuple[str, ...] | str | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    learn_rank: bool = True
    placement: Placement = Placement.SEPARATE
    compensated: bool = False
    all_codes: bool = False
    scale_bits: ScaleBits = 32
    granularity: Granularity = Granularity.TENSOR
    input_granularity: Granularity = Granularity.TENSOR
    affine_inputs: bool = False
    group_size: int = 64
    share_inputs: bool = True
    tie_groups: bool = False
    quantize_attention: bool = False
    quantize_head: bool = False
    weight_gradient_rows: int | None = None
    mora: MoraForm = MoraForm()
    width: int | None = None
    virtual_tokens: int = 20
    trained_in_full: tuple[str, ...] = ()
    layers: int = 0

    @property
    def rounds_sum(self) -> bool:
        """Whether one quantizer rounds the sum of W0 and the update, so that merging keeps every width."""
        return self.method is Method.BAYESIAN_LORA and self.placement is Placement.MERGED and "weight" in self.sites

    @property
    def quantizes_attention(self) -> bool:
        """Whether operands of attention have quantizers where their layers are adapted; other methods have none."""
        return self.method is Method.BAYESIAN_LORA and self.quantize_attention
