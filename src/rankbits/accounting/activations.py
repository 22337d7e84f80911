"""What a training pass keeps for its backward pass, and what it writes besides, in bytes by formula.

Autograd keeps an operand only where a gradient needs it: a linear layer its input if its weight is trained, a product
of activations both of them, a norm its input. Nothing is kept before the first trained weight. The rules are exact for
blocks like BERT's and Llama's under full fine-tuning, LoRA and Bayesian-LoRA in fp32 on a CPU; for other methods and
architectures they are the same rules without a proof.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rankbits.accounting.adapter_activations import EAGER_COPIES, keep_adapter, keep_head
from rankbits.accounting.ledger import Ledger
from rankbits.accounting.methods import extra_keys, extra_tokens
from rankbits.accounting.params import quantized_heads, targeted
from rankbits.accounting.quantizers import PROBABILITIES, owned
from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.spec import (
    Activation,
    Attention,
    Convolution,
    Linear,
    Method,
    MethodSpec,
    ModelShape,
    Norm,
    Part,
    Rows,
    Table,
)
from rankbits.accounting.trained import block_of, trained_in_full

INDEX_BYTES = 8
"""Token ids and labels are 64-bit integers."""
FLOAT = 4


@dataclass(frozen=True, slots=True)
class PassBytes:
    """Bytes of one forward pass.

    Args:
        kept: what autograd keeps until the backward pass uses it, without the loss over a vocabulary.
        temporary: what is written and freed again in blocks that glibc keeps (below 32 MiB).
        largest: the largest block that is written, without those of a vocabulary.
        logits: the log-probabilities that the loss over a vocabulary keeps.
    """

    kept: int
    temporary: int
    largest: int
    logits: int


@dataclass
class _Walk:
    """The parts in running order, and whether what runs by already carries a gradient."""

    shape: ModelShape
    spec: MethodSpec
    settings: TrainingSettings
    ledger: Ledger = field(default_factory=Ledger)
    flows: bool = False
    tables: int = 0
    segment: int = 0
    carried: bool = False
    """Whether the tensor that the linear layers of this segment read carries a gradient."""
    held_input: tuple[int, int] | None = None
    rotated: bool = False

    def __post_init__(self) -> None:
        self.trained = trained_in_full(self.shape, self.spec)
        self.adapted = owned(targeted(self.shape, self.spec), self.spec)
        self.quantized_heads = {linear.name for linear in quantized_heads(self.shape, self.spec)}
        usual = not self.shape.decoder or self.shape.two_stacks
        self.dropout = usual if self.settings.dropout is None else self.settings.dropout
        self.width = self.settings.activation_bytes
        # Under autocast the residual stream stays in fp32.
        self.norm_width = FLOAT if self.settings.autocast else self.width

    def rows(self, rows: Rows, positions: int = 0) -> int:
        settings = self.settings
        if rows is Rows.SEQUENCES:
            return settings.batch
        if rows is Rows.POSITIONS:
            return positions
        return settings.batch * (settings.sequence_length + extra_tokens(self.spec))

    def run(self, part: Part) -> None:
        match part:
            case Table():
                self._table(part)
            case Norm():
                self._norm(part)
            case Activation():
                self._activation(part)
            case Attention():
                self._attention(part)
            case Linear():
                self._linear(part)
            case Convolution():
                size = self.rows(Rows.TOKENS) * max(part.c_in, part.c_out) * self.width
                self.flows |= part.name in self.trained
                self.ledger.write(size)
                self.ledger.keep(size if self.flows else 0)
        if isinstance(part, Norm | Attention) or (isinstance(part, Activation) and not part.gated):
            self.segment += 1
            self.carried = self.flows
        elif isinstance(part, Activation | Table):
            self.carried = self.flows

    def _table(self, part: Table) -> None:
        self.tables += 1
        size = self.rows(Rows.TOKENS) * part.width * self.width
        self.ledger.write(size, size if self.tables > 1 else 0)
        if part.name in self.trained:
            self.flows = True
            # Token types are one row for the batch, and positions are a constant of the model.
            rows = {1: self.settings.tokens, 2: self.settings.sequence_length}.get(self.tables, 0)
            self.ledger.keep(rows * INDEX_BYTES)

    def _norm(self, part: Norm) -> None:
        """Input, and mean and deviation of each row (LayerNorm) or its deviation (RMSNorm)."""
        rows, trained = self.rows(part.rows), part.name in self.trained
        size = rows * part.width * self.norm_width
        self.ledger.write(size, size, *(() if part.bias else (size, size)))
        self.flows |= trained
        if self.flows:
            self.ledger.keep(size, *([rows * FLOAT] * (2 if part.bias else 1)))
        if self.flows and trained and not part.bias:
            self.ledger.keep(size)
        self._drop(size)

    def _drop(self, size: int) -> None:
        """Dropout beside each norm of an encoder keeps its noise."""
        if self.dropout:
            self.ledger.write(size, size)
            self.ledger.keep(size if self.flows else 0)

    def _activation(self, part: Activation) -> None:
        size = self.rows(part.rows) * part.width * self.width
        self.ledger.write(size, *((size,) if part.gated else ()))
        if self.flows:
            self.ledger.keep(*([size] * (3 if part.gated else 1)))
        if part.rows is Rows.SEQUENCES:
            self._drop(size)

    def _linear(self, part: Linear) -> None:
        rows, trained = self.rows(part.rows, part.position_rows), part.name in self.trained
        adapted = part.name in self.adapted
        # The gates and the range of an input's quantizer learn even where nothing before them does.
        before = self.carried or (adapted and "input" in self.spec.sites)
        if part.rows is not Rows.HEAD:
            self.ledger.write(rows * part.d_out * self.width)
        # MoRA's matrix reads what it compressed, not the input.
        if trained or (adapted and self.spec.method is not Method.MORA):
            self._hold_input(part, rows)
        self.flows |= trained or adapted
        if adapted:
            own = self.adapted[part.name]
            keep_adapter(self.ledger, part, self.spec, own, rows, self.settings, carries=before)
        elif part.name in self.quantized_heads:
            keep_head(self.ledger, part, self.spec, rows, self.settings)
        if self.settings.autocast and before:
            # The half-precision copy of the weight, which the gradient of the input needs.
            self.ledger.keep(part.d_in * part.d_out * self.width)

    def _hold_input(self, part: Linear, rows: int) -> None:
        """One tensor for all linear layers that read it: q, k and v, or gate and up."""
        if self.held_input == (self.segment, part.d_in):
            return
        self.held_input = (self.segment, part.d_in)
        if part.rows is Rows.SEQUENCES:
            # The pooler reads the first token of a tensor that stays whole; a head reads the pooler's output, which
            # only dropout makes another tensor.
            pooled = self._after_pooler(part)
            whole = self.rows(Rows.TOKENS) if not pooled else (rows if self.dropout else 0)
            self.ledger.keep(whole * part.d_in * self.width)
        elif not (self._follows_fused_attention(part)):
            self.ledger.keep(rows * part.d_in * self.width)

    def _after_pooler(self, part: Linear) -> bool:
        index = self.shape.parts.index(part)
        return any(isinstance(p, Activation) and p.rows is Rows.SEQUENCES for p in self.shape.parts[:index])

    def _follows_fused_attention(self, part: Linear) -> bool:
        """Whether the input is the output of a fused attention, which that has kept already."""
        index = self.shape.parts.index(part)
        return index > 0 and isinstance(self.shape.parts[index - 1], Attention) and self._fused

    @property
    def _fused(self) -> bool:
        unfused = self.spec.quantizes_attention or (self.dropout and self.settings.device == "cpu")
        return self.settings.attention == "sdpa" and not unfused

    def _attention(self, part: Attention) -> None:
        rows, keys = self.rows(part.rows), self.settings.sequence_length + extra_keys(self.spec)
        queries = rows * part.heads * part.head_dim * self.width
        shared = self.settings.batch * keys * part.key_heads * part.head_dim * self.width
        repeated = shared * (part.heads // part.key_heads)
        if part.rotary:
            # Two products, a negated half, a concatenation and a sum.
            self.ledger.write(*[queries, queries // 2, queries, queries, queries])
            self.ledger.write(*[shared, shared // 2, shared, shared, shared])
        if part.rotary and self.flows and not self.rotated:
            self.rotated = True
            self.ledger.keep(*[self.settings.sequence_length * part.head_dim * FLOAT] * 2)
        if self._fused:
            sums = rows * part.heads * FLOAT
            self.ledger.write(queries, sums)
            self.ledger.keep(*((queries, shared, shared, queries, sums) if self.flows else ()))
            return
        self._unfused(part, queries, repeated, rows * part.heads * keys * self.width)

    def _unfused(self, part: Attention, queries: int, keys: int, scores: int) -> None:
        """Scores, their softmax and what dropout makes of it; operands of batched products are copied."""
        maps = 3 if self.dropout else 1
        self.ledger.write(queries, keys, keys, queries, queries, *([scores] * (maps + 1)))
        if part.position_rows:
            beside = self.rows(part.rows) * part.heads * part.position_rows * self.width
            compared = part.c2p + part.p2c
            self.ledger.write(*([beside, scores] * compared))
            # Gathering keeps 64-bit indices of the whole map.
            self.ledger.keep(*([scores // self.width * INDEX_BYTES] * compared if self.flows else ()))
        if self.flows:
            self.ledger.keep(queries, keys, keys, *([scores] * maps))
        if part.values in self.adapted and PROBABILITIES in self.adapted[part.values].quantizers:
            # What goes into the quantizer is kept by the softmax anyway, what comes out by the product; dropout between
            # the two keeps its noise alone.
            self.ledger.keep(scores if self.flows and not self.dropout else 0)
            self.ledger.write(*[scores] * (1 if self.settings.compiled else 1 + EAGER_COPIES))


def forward_bytes(shape: ModelShape, spec: MethodSpec, settings: TrainingSettings) -> PassBytes:
    """What one training pass keeps and writes, by part, in running order.

    Args:
        shape: the model, with its head.
        spec: the method.
        settings: batch, length, precision, attention, checkpointing.

    Raises:
        ModelError: the method's targets match nothing.
    """
    walk = _Walk(shape, spec, settings)
    kept_of_block: dict[tuple[str, int], int] = {}
    inputs = 0
    for part in shape.parts:
        before, place = walk.ledger.kept, block_of(part)
        inputs += walk.rows(Rows.TOKENS) * shape.hidden * walk.width if place and place not in kept_of_block else 0
        walk.run(part)
        if place:
            kept_of_block[place] = kept_of_block.get(place, 0) + walk.ledger.kept - before
    kept = walk.ledger.kept
    if settings.checkpointing and kept_of_block:
        # One block at a time is run again; the others have left nothing but their input.
        kept = kept - sum(kept_of_block.values()) + max(kept_of_block.values()) + inputs
    return PassBytes(
        kept=kept + _loss_bytes(shape, settings),
        temporary=walk.ledger.temporary,
        largest=walk.ledger.largest,
        logits=_log_probabilities(shape, settings),
    )


def _language_model(shape: ModelShape) -> Linear | None:
    heads = [linear for linear in shape.linears() if linear.rows is Rows.HEAD]
    return heads[-1] if heads else None


def _log_probabilities(shape: ModelShape, settings: TrainingSettings) -> int:
    """The loss is taken in fp32 whatever the precision, at every position."""
    head = _language_model(shape)
    return settings.tokens * head.d_out * FLOAT if head is not None else 0


def _loss_bytes(shape: ModelShape, settings: TrainingSettings) -> int:
    """Labels, the sum of their weights, and the log-probabilities of classes."""
    if _language_model(shape) is not None:
        return settings.tokens * INDEX_BYTES + FLOAT
    last = shape.parts[-1]
    classes = last.d_out if isinstance(last, Linear) and last.rows is Rows.SEQUENCES else 0
    return settings.batch * (classes * FLOAT + INDEX_BYTES) + FLOAT
