"""Models with an encoder and a decoder by their configs: T5, mT5 and BART, part by part under their live names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rankbits.accounting.architectures.config import Config, Head
from rankbits.accounting.spec import Activation, Attention, Linear, ModelShape, Norm, Part, Rows, Table

LEARNED_POSITIONS_OFFSET = 2
"""BART keeps two more rows of learned positions than it has positions: the first two are never read."""


@dataclass(frozen=True, slots=True)
class _Stack:
    """One of the two stacks.

    Args:
        name: qualified name.
        layers: how many blocks.
        decoder: whether it is the one that generates.
    """

    name: str
    layers: int
    decoder: bool

    @property
    def rows(self) -> Rows:
        """Rows that its blocks work on."""
        return Rows.TOKENS if self.decoder else Rows.SOURCE


@dataclass(frozen=True, slots=True)
class _Attending:
    """The sizes of an attention and the last names of its layers: queries, keys, values, output."""

    hidden: int
    heads: int
    head_dim: int
    letters: tuple[str, str, str, str]
    bias: bool

    def parts(
        self, name: str, rows: Rows, over: Rows, table: Table | None = None, *, causal: bool = False
    ) -> list[Part]:
        """Its parts: queries of `rows`, keys and values of `over`, the table of its biases, products, output."""
        inner = self.heads * self.head_dim
        queries, keys, values, out = (f"{name}.{letter}" for letter in self.letters)
        return [
            Linear(queries, self.hidden, inner, bias=self.bias, rows=rows),
            Linear(keys, self.hidden, inner, bias=self.bias, rows=over),
            Linear(values, self.hidden, inner, bias=self.bias, rows=over),
            *([table] if table is not None else []),
            Attention(
                name, queries, keys, values, self.heads, self.heads, self.head_dim, rows=rows, over=over, causal=causal
            ),
            Linear(out, inner, self.hidden, bias=self.bias, rows=rows),
        ]


def _t5(config: Config, head: Head, num_labels: int) -> ModelShape:
    """T5 and its gated successors, mT5 included (Raffel et al. 2020, Xue et al. 2021).

    A config that says that the head is not tied is believed: the published files of T5 v1.1, mT5 and mT0 hold both.
    """
    hidden, layers = config.size("d_model"), config.size("num_layers")
    stem = "transformer." if head is Head.CLASSIFICATION else ""
    shared = f"{stem}shared"
    stacks = (
        _Stack(f"{stem}encoder", layers, decoder=False),
        _Stack(f"{stem}decoder", config.size("num_decoder_layers", layers), decoder=True),
    )
    parts: list[Part] = [Table(shared, config.size("vocab_size"), hidden)]
    for stack in stacks:
        parts += _t5_stack(config, stack)
    tied = config.flag("tie_word_embeddings", True)
    parts += _top(config, head, num_labels, tied_to=shared if tied else None)
    return _shape(config, parts, layers=sum(stack.layers for stack in stacks), max_length=None, targets=("q", "v"))


def _t5_stack(config: Config, stack: _Stack) -> list[Part]:
    hidden, heads, rows = config.size("d_model"), config.size("num_heads"), stack.rows
    attending = _Attending(hidden, heads, config.size("d_kv"), ("q", "k", "v", "o"), bias=False)
    parts: list[Part] = []
    for index in range(stack.layers):
        layer = f"{stack.name}.block.{index}.layer"
        own = f"{layer}.0.SelfAttention"
        # The biases of relative positions live in the first block, and all blocks add them.
        buckets = config.size("relative_attention_num_buckets", 32)
        table = Table(f"{own}.relative_attention_bias", buckets, heads) if index == 0 else None
        parts.append(Norm(f"{layer}.0.layer_norm", hidden, bias=False, rows=rows))
        parts += attending.parts(own, rows, rows, table=table, causal=stack.decoder)
        if stack.decoder:
            parts.append(Norm(f"{layer}.1.layer_norm", hidden, bias=False, rows=rows))
            parts += attending.parts(f"{layer}.1.EncDecAttention", rows, Rows.SOURCE)
        last = f"{layer}.{2 if stack.decoder else 1}"
        parts.append(Norm(f"{last}.layer_norm", hidden, bias=False, rows=rows))
        parts += _t5_feed_forward(config, f"{last}.DenseReluDense", rows)
    parts.append(Norm(f"{stack.name}.final_layer_norm", hidden, bias=False, rows=rows))
    return parts


def _t5_feed_forward(config: Config, name: str, rows: Rows) -> list[Part]:
    """Plain, or gated where `feed_forward_proj` is gated-something (Shazeer 2020)."""
    hidden, inner = config.size("d_model"), config.size("d_ff")
    usual = "gated-gelu" if config.model_type == "mt5" else "relu"
    words = config.text("feed_forward_proj", usual).split("-")
    if len(words) > 2 or (len(words) == 2 and words[0] != "gated"):
        raise config.error("feed_forward_proj", "the name of an activation, or gated- and the name of one")
    gated = words[0] == "gated"
    ways = ("wi_0", "wi_1") if gated else ("wi",)
    return [
        *(Linear(f"{name}.{way}", hidden, inner, bias=False, rows=rows) for way in ways),
        Activation(f"{name}.act", inner, gated=gated, rows=rows),
        Linear(f"{name}.wo", inner, hidden, bias=False, rows=rows),
    ]


def _bart(config: Config, head: Head, num_labels: int) -> ModelShape:
    """BART (Lewis et al. 2020): learned positions in both stacks, norms after the residual sums."""
    hidden = config.size("d_model")
    stem = "" if head is Head.NONE else "model."
    stacks = (
        _Stack(f"{stem}encoder", config.size("encoder_layers"), decoder=False),
        _Stack(f"{stem}decoder", config.size("decoder_layers"), decoder=True),
    )
    tied = config.flag("tie_word_embeddings", True)
    vocabulary = config.size("vocab_size")
    parts: list[Part] = [Table(f"{stem}shared", vocabulary, hidden)]
    for stack in stacks:
        if not tied:
            # The flag speaks of all copies of the token table, not of the head alone.
            parts.append(Table(f"{stack.name}.embed_tokens", vocabulary, hidden))
        parts += _bart_stack(config, stack)
    parts += _top(config, head, num_labels, tied_to=f"{stem}shared" if tied else None)
    positions = config.size("max_position_embeddings")
    layers = sum(stack.layers for stack in stacks)
    return _shape(config, parts, layers=layers, max_length=positions, targets=("q_proj", "v_proj"))


def _bart_stack(config: Config, stack: _Stack) -> list[Part]:
    hidden, rows = config.size("d_model"), stack.rows
    kind = "decoder" if stack.decoder else "encoder"
    heads, inner = config.size(f"{kind}_attention_heads"), config.size(f"{kind}_ffn_dim")
    width = config.part_of(f"{kind}_attention_heads", "d_model")
    attending = _Attending(hidden, heads, width, ("q_proj", "k_proj", "v_proj", "out_proj"), bias=True)
    positions = config.size("max_position_embeddings") + LEARNED_POSITIONS_OFFSET
    parts: list[Part] = [Table(f"{stack.name}.embed_positions", positions, hidden)]
    parts.append(Norm(f"{stack.name}.layernorm_embedding", hidden, rows=rows))
    for index in range(stack.layers):
        block = f"{stack.name}.layers.{index}"
        parts += attending.parts(f"{block}.self_attn", rows, rows, causal=stack.decoder)
        parts.append(Norm(f"{block}.self_attn_layer_norm", hidden, rows=rows))
        if stack.decoder:
            parts += attending.parts(f"{block}.encoder_attn", rows, Rows.SOURCE)
            parts.append(Norm(f"{block}.encoder_attn_layer_norm", hidden, rows=rows))
        parts += [
            Linear(f"{block}.fc1", hidden, inner, rows=rows),
            Activation(f"{block}.activation_fn", inner, rows=rows),
            Linear(f"{block}.fc2", inner, hidden, rows=rows),
            Norm(f"{block}.final_layer_norm", hidden, rows=rows),
        ]
    return parts


def _top(config: Config, head: Head, num_labels: int, *, tied_to: str | None) -> list[Part]:
    """The head. Classification reads one row per sequence, that of its end token, and "all-linear" reaches it."""
    hidden = config.size("d_model")
    if head is Head.LANGUAGE_MODEL:
        vocabulary = config.size("vocab_size")
        return [Linear("lm_head", hidden, vocabulary, bias=False, rows=Rows.HEAD, op="head", tied_to=tied_to)]
    if head is Head.CLASSIFICATION:
        return [
            Linear("classification_head.dense", hidden, hidden, rows=Rows.SEQUENCES),
            Activation("classification_head", hidden, rows=Rows.SEQUENCES),
            Linear("classification_head.out_proj", hidden, num_labels, rows=Rows.SEQUENCES),
        ]
    return []


def _shape(
    config: Config, parts: list[Part], *, layers: int, max_length: int | None, targets: tuple[str, ...]
) -> ModelShape:
    return ModelShape(
        name=config.name,
        model_type=config.model_type,
        parts=tuple(parts),
        hidden=config.size("d_model"),
        layers=layers,
        max_length=max_length,
        vocabulary=config.size("vocab_size"),
        usual_targets=targets,
        stored_bits=config.stored_bits,
        decoder=True,
        two_stacks=True,
    )


READERS: dict[str, Callable[[Config, Head, int], ModelShape]] = {"t5": _t5, "mt5": _t5, "bart": _bart}
"""Readers by model_type. Each takes a config, the head on top and the number of labels, and raises ModelError."""
