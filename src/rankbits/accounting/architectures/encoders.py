"""Encoders part by part: BERT and RoBERTa with their kin, DistilBERT, and DeBERTa v2 and v3.

All names are those of the live modules of transformers, in the order in which they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rankbits.accounting.architectures.config import Config, Head
from rankbits.accounting.spec import Activation, Attention, Convolution, Linear, ModelShape, Norm, Part, Rows, Table
from rankbits.errors import ModelError


@dataclass(frozen=True, slots=True)
class _Positions:
    """DeBERTa's relative positions: rows of its table (0: none), and which comparisons with them run.

    Rows are projected by the query and key of the tokens if `shared`, else by matrices of their own.
    """

    rows: int = 0
    shared: bool = True
    c2p: bool = False
    p2c: bool = False


@dataclass(frozen=True, slots=True)
class _Stack:
    """Sizes of a stack of blocks laid out as BERT's, and the last names of its q, k and v."""

    config: Config
    projections: tuple[str, str, str] = ("query", "key", "value")
    positions: _Positions = _Positions()

    @property
    def hidden(self) -> int:
        return self.config.size("hidden_size")

    @property
    def layers(self) -> int:
        return self.config.size("num_hidden_layers")

    def block(self, name: str) -> Iterator[Part]:
        """One block: self-attention, then the feed-forward part, a LayerNorm behind each."""
        hidden, wide = self.hidden, self.config.size("intermediate_size")
        yield from self._attention(f"{name}.attention.self")
        yield from _onto_residual(f"{name}.attention.output", hidden, hidden)
        yield Linear(f"{name}.intermediate.dense", hidden, wide)
        yield Activation(f"{name}.intermediate.intermediate_act_fn", wide)
        yield from _onto_residual(f"{name}.output", wide, hidden)

    def _attention(self, name: str) -> Iterator[Part]:
        query, key, value = (f"{name}.{last}" for last in self.projections)
        positions, rows = self.positions, self.positions.rows
        shared = rows if positions.shared else 0
        yield Linear(query, self.hidden, self.hidden, position_rows=shared, position_op="pos_query" if shared else "")
        yield Linear(key, self.hidden, self.hidden, position_rows=shared, position_op="pos_key" if shared else "")
        yield Linear(value, self.hidden, self.hidden)
        if not positions.shared:
            yield from self._own_projections(name)
        heads = self.config.size("num_attention_heads")
        yield Attention(
            name,
            query,
            key,
            value,
            heads,
            heads,
            self.config.part_of("num_attention_heads", "hidden_size"),
            position_rows=rows,
            c2p=positions.c2p,
            p2c=positions.p2c,
        )

    def _own_projections(self, name: str) -> Iterator[Part]:
        for last, op, runs in (
            ("pos_key_proj", "pos_key", self.positions.c2p),
            ("pos_query_proj", "pos_query", self.positions.p2c),
        ):
            if runs:
                yield Linear(
                    f"{name}.{last}",
                    self.hidden,
                    self.hidden,
                    rows=Rows.POSITIONS,
                    position_rows=self.positions.rows,
                    position_op=op,
                )

    def shape(self, parts: list[Part], max_length: int | None) -> ModelShape:
        """`parts` with what the config says about the whole model."""
        return ModelShape(
            name=self.config.name,
            model_type=self.config.model_type,
            parts=tuple(parts),
            hidden=self.hidden,
            layers=self.layers,
            max_length=max_length,
            vocabulary=self.config.size("vocab_size"),
            usual_targets=(self.projections[0], self.projections[2]),
            stored_bits=self.config.stored_bits,
        )


def read_bert(config: Config, head: Head, num_labels: int) -> ModelShape:
    """BERT (Devlin et al. 2019), MiniLM too.

    Raises:
        ModelError: for a size that is none, a decoder built from BERT, or a masked-word head.
    """
    prefix = _prefix(config, head, "bert.")
    stack = _Stack(config)
    parts = list(_bert_body(stack, prefix))
    # The pooler belongs to the bare model and runs whether or not a head uses it.
    parts += _dense(f"{prefix}pooler.dense", f"{prefix}pooler.activation", stack.hidden)
    if head is Head.CLASSIFICATION:
        parts.append(Linear("classifier", stack.hidden, num_labels, rows=Rows.SEQUENCES, op="head"))
    return stack.shape(parts, config.size("max_position_embeddings", 512))


def read_roberta(config: Config, head: Head, num_labels: int) -> ModelShape:
    """RoBERTa (Liu et al. 2019) and its kin, XLM-R and CamemBERT: BERT with a two-layer head in the pooler's place.

    Their position numbers start behind the padding token's, so that the table has more rows than a text has places.

    Raises:
        ModelError: for a size that is none, a decoder built from RoBERTa, or a masked-word head.
    """
    prefix = _prefix(config, head, "roberta.")
    stack = _Stack(config)
    parts = list(_bert_body(stack, prefix))
    if head is Head.CLASSIFICATION:
        parts += _dense("classifier.dense", "classifier", stack.hidden)
        parts.append(Linear("classifier.out_proj", stack.hidden, num_labels, rows=Rows.SEQUENCES))
    else:
        parts += _dense("pooler.dense", "pooler.activation", stack.hidden)
    unused = config.size("pad_token_id", 1, minimum=0) + 1
    rows = config.size("max_position_embeddings", 512)
    if rows <= unused:
        raise config.error("max_position_embeddings", f"more than {unused}, the first position of a text")
    return stack.shape(parts, rows - unused)


def _bert_body(stack: _Stack, prefix: str) -> Iterator[Part]:
    config, hidden = stack.config, stack.hidden
    for key in ("is_decoder", "add_cross_attention"):
        if config.flag(key, False):
            raise config.error(key, "false: it is counted as an encoder")
    if config.text("position_embedding_type", "absolute") != "absolute":
        raise config.error("position_embedding_type", "absolute: relative keys are not counted")
    yield Table(f"{prefix}embeddings.word_embeddings", config.size("vocab_size"), hidden)
    yield Table(f"{prefix}embeddings.token_type_embeddings", config.size("type_vocab_size", 2), hidden)
    yield Table(f"{prefix}embeddings.position_embeddings", config.size("max_position_embeddings", 512), hidden)
    yield Norm(f"{prefix}embeddings.LayerNorm", hidden)
    for layer in range(stack.layers):
        yield from stack.block(f"{prefix}encoder.layer.{layer}")


def read_deberta(config: Config, head: Head, num_labels: int) -> ModelShape:
    """DeBERTa v2 and v3 (He et al. 2021, 2023): content and relative positions are projected and compared apart.

    The rows of the position table are two for each bucket, or for each distance where there are no buckets. All of
    them are projected and compared, whatever the length of the text, and then gathered.

    Raises:
        ModelError: for a size that is none, a width of heads or pooler that does not fit the hidden size, or a
            masked-word head.
    """
    prefix = _prefix(config, head, "deberta.")
    stack = _Stack(config, ("query_proj", "key_proj", "value_proj"), _relative_positions(config))
    head_dim = config.part_of("num_attention_heads", "hidden_size")
    if config.size("attention_head_size", head_dim) != head_dim:
        raise config.error("attention_head_size", f"hidden_size divided by num_attention_heads, which is {head_dim}")
    if config.size("pooler_hidden_size", stack.hidden) != stack.hidden:
        raise config.error("pooler_hidden_size", f"hidden_size, which is {stack.hidden}")
    parts = [*_deberta_embeddings(config, prefix), *_deberta_encoder(stack, f"{prefix}encoder")]
    if head is Head.CLASSIFICATION:
        parts += _dense("pooler.dense", "pooler", stack.hidden)
        parts.append(Linear("classifier", stack.hidden, num_labels, rows=Rows.SEQUENCES, op="head"))
    absolute = config.flag("position_biased_input", True)
    return stack.shape(parts, config.size("max_position_embeddings", 512) if absolute else None)


def _relative_positions(config: Config) -> _Positions:
    if not config.flag("relative_attention", False):
        return _Positions()
    # A negative number is how these configs say that there is no limit of its own.
    distances = config.size("max_relative_positions", -1, minimum=-1)
    if distances < 1:
        distances = config.size("max_position_embeddings", 512)
    buckets = config.size("position_buckets", -1, minimum=-1)
    kinds = {kind.lower() for kind in config.texts("pos_att_type")}
    if not kinds <= {"c2p", "p2c"}:
        raise config.error("pos_att_type", "c2p, p2c or both")
    return _Positions(
        rows=2 * (buckets if buckets > 0 else distances),
        shared=config.flag("share_att_key", False),
        c2p="c2p" in kinds,
        p2c="p2c" in kinds,
    )


def _deberta_embeddings(config: Config, prefix: str) -> Iterator[Part]:
    hidden = config.size("hidden_size")
    width = config.size("embedding_size", hidden)
    yield Table(f"{prefix}embeddings.word_embeddings", config.size("vocab_size"), width)
    if config.flag("position_biased_input", True):
        yield Table(f"{prefix}embeddings.position_embeddings", config.size("max_position_embeddings", 512), width)
    kinds = config.size("type_vocab_size", 0, minimum=0)
    if kinds:
        yield Table(f"{prefix}embeddings.token_type_embeddings", kinds, width)
    if width != hidden:
        yield Linear(f"{prefix}embeddings.embed_proj", width, hidden, bias=False)
    yield Norm(f"{prefix}embeddings.LayerNorm", hidden)


def _deberta_encoder(stack: _Stack, name: str) -> Iterator[Part]:
    config, rows = stack.config, stack.positions.rows
    if rows:
        yield Table(f"{name}.rel_embeddings", rows, stack.hidden)
    if "layer_norm" in map(str.lower, config.texts("norm_rel_ebd")):
        yield Norm(f"{name}.LayerNorm", stack.hidden, rows=Rows.POSITIONS, position_rows=rows)
    kernel = config.size("conv_kernel_size", 0, minimum=0)
    for layer in range(stack.layers):
        yield from stack.block(f"{name}.layer.{layer}")
        if layer == 0 and kernel:
            yield from _convolution(config, f"{name}.conv", kernel)


def _convolution(config: Config, name: str, kernel: int) -> Iterator[Part]:
    """Neighbouring tokens of the embeddings, added to what the first block returned."""
    hidden, groups = config.size("hidden_size"), config.size("conv_groups", 1)
    if kernel % 2 == 0:
        raise config.error("conv_kernel_size", "an odd number: an even one changes the length")
    if hidden % groups:
        raise config.error("conv_groups", f"a divisor of hidden_size, which is {hidden}")
    yield Convolution(f"{name}.conv", hidden, hidden, (kernel,), groups=groups)
    yield Activation(name, hidden)
    yield Norm(f"{name}.LayerNorm", hidden)


def read_distilbert(config: Config, head: Head, num_labels: int) -> ModelShape:
    """DistilBERT (Sanh et al. 2019): BERT's block under other names, without token types and pooler.

    Raises:
        ModelError: for a size that is none, or a masked-word head.
    """
    prefix = _prefix(config, head, "distilbert.")
    hidden, layers = config.size("dim"), config.size("n_layers")
    words, places = config.size("vocab_size"), config.size("max_position_embeddings", 512)
    parts: list[Part] = [
        Table(f"{prefix}embeddings.word_embeddings", words, hidden),
        Table(f"{prefix}embeddings.position_embeddings", places, hidden),
        Norm(f"{prefix}embeddings.LayerNorm", hidden),
    ]
    for layer in range(layers):
        parts += _distilbert_block(config, f"{prefix}transformer.layer.{layer}")
    if head is Head.CLASSIFICATION:
        # Its ReLU is made anew in each call and belongs to no module of its own.
        parts += _dense("pre_classifier", "pre_classifier", hidden)
        parts.append(Linear("classifier", hidden, num_labels, rows=Rows.SEQUENCES, op="head"))
    return ModelShape(
        name=config.name,
        model_type=config.model_type,
        parts=tuple(parts),
        hidden=hidden,
        layers=layers,
        max_length=places,
        vocabulary=words,
        usual_targets=("q_lin", "v_lin"),
        stored_bits=config.stored_bits,
    )


def _distilbert_block(config: Config, name: str) -> Iterator[Part]:
    hidden, wide, heads = config.size("dim"), config.size("hidden_dim"), config.size("n_heads")
    query, key, value = (f"{name}.attention.{last}" for last in ("q_lin", "k_lin", "v_lin"))
    yield from (Linear(each, hidden, hidden) for each in (query, key, value))
    yield Attention(f"{name}.attention", query, key, value, heads, heads, config.part_of("n_heads", "dim"))
    yield Linear(f"{name}.attention.out_lin", hidden, hidden)
    yield Norm(f"{name}.sa_layer_norm", hidden)
    yield Linear(f"{name}.ffn.lin1", hidden, wide)
    yield Activation(f"{name}.ffn.activation", wide)
    yield Linear(f"{name}.ffn.lin2", wide, hidden)
    yield Norm(f"{name}.output_layer_norm", hidden)


def _onto_residual(name: str, d_in: int, hidden: int) -> Iterator[Part]:
    """BERT's way out of half a block: back to the hidden size, added to what came in, normalized."""
    yield Linear(f"{name}.dense", d_in, hidden)
    yield Norm(f"{name}.LayerNorm", hidden)


def _dense(name: str, activation: str, hidden: int) -> list[Part]:
    """One dense layer on the first token of each sequence."""
    return [
        Linear(name, hidden, hidden, rows=Rows.SEQUENCES),
        Activation(activation, hidden, rows=Rows.SEQUENCES),
    ]


def _prefix(config: Config, head: Head, prefix: str) -> str:
    """Where the bare model sits: at the top if it stands alone, else below `prefix`."""
    if head is Head.LANGUAGE_MODEL:
        raise ModelError(
            f"config of {config.name}: model_type: given {config.model_type!r} for a language-model head, expected a "
            "decoder or a model of two stacks: the masked-word head of an encoder is not counted"
        )
    return "" if head is Head.NONE else prefix


READERS: dict[str, Callable[[Config, Head, int], ModelShape]] = {
    "bert": read_bert,
    "camembert": read_roberta,
    "deberta-v2": read_deberta,
    "distilbert": read_distilbert,
    "roberta": read_roberta,
    "xlm-roberta": read_roberta,
}
