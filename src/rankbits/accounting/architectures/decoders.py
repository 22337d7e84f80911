"""Decoders by their configs: Llama, Qwen2, Mistral, Gemma, Phi, OPT and GPT-2, part by part under their live names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rankbits.accounting.architectures.config import Config, Head
from rankbits.accounting.spec import Activation, Attention, Linear, ModelShape, Norm, Part, Rows, Table

QUERY_AND_VALUE = ("q_proj", "v_proj")
LEARNED_POSITIONS_OFFSET = 2
"""OPT and BART keep two more rows of learned positions than they have positions: the first two are never read."""


@dataclass(frozen=True, slots=True)
class _Heads:
    """How attention shares the hidden width out."""

    heads: int
    key_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class _Traits:
    """Wherein the relatives of Llama differ.

    Args:
        heads: query heads, key heads and their width.
        windows: keys that a query sees at most, block by block; None: no windows.
        qkv_bias, out_bias, mlp_bias: which linear layers have a bias.
        tied: whether the head is the token table where the config does not say.
    """

    heads: _Heads
    windows: Sequence[int | None] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False


def _llama(config: Config, head: Head, num_labels: int) -> ModelShape:
    """Llama 1 to 3 and SmolLM2 (Touvron et al. 2023): gated MLP, rotary positions, grouped-query attention."""
    bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    heads = _grouped(config, config.size("num_attention_heads"))
    return _gated(config, head, num_labels, _Traits(heads, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias))


def _qwen2(config: Config, head: Head, num_labels: int) -> ModelShape:
    """Qwen2 (Yang et al. 2024): as Llama, with a bias on queries, keys and values and windows in the upper blocks."""
    traits = _Traits(_grouped(config), _qwen2_windows(config), qkv_bias=True)
    return _gated(config, head, num_labels, traits)


def _qwen2_windows(config: Config) -> list[int | None] | None:
    if not config.flag("use_sliding_window", False):
        return None
    layers, window = config.size("num_hidden_layers"), config.size("sliding_window", 4096)
    types = config.texts("layer_types")
    if types and len(types) != layers:
        raise config.error("layer_types", f"one type for each of {layers} layers")
    first = config.size("max_window_layers", 28, minimum=0)
    slides = [kind == "sliding_attention" for kind in types] or [index >= first for index in range(layers)]
    return [window if slide else None for slide in slides]


def _mistral(config: Config, head: Head, num_labels: int) -> ModelShape:
    """Mistral (Jiang et al. 2023): as Llama, with one window in all blocks; none where the config names none."""
    windows = [config.optional_size("sliding_window")] * config.size("num_hidden_layers")
    return _gated(config, head, num_labels, _Traits(_grouped(config), windows))


def _gemma(config: Config, head: Head, num_labels: int) -> ModelShape:
    """Gemma 1 (Gemma Team 2024): as Llama, with a head width of its own and a tied head."""
    bias = config.flag("attention_bias", False)
    return _gated(config, head, num_labels, _Traits(_grouped(config), qkv_bias=bias, out_bias=bias, tied=True))


def _grouped(config: Config, otherwise: int | None = None) -> _Heads:
    """Heads of grouped-query attention (Ainslie et al. 2023): each key head serves as many query heads.

    Where the config names no key heads there are `otherwise` many.
    """
    heads, key_heads = config.size("num_attention_heads"), config.size("num_key_value_heads", otherwise)
    if heads % key_heads:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, which is {heads}")
    # The two need not multiply to the hidden width, so a given head width comes first.
    own = config.optional_size("head_dim")
    return _Heads(heads, key_heads, own or config.part_of("num_attention_heads", "hidden_size"))


def _gated(config: Config, head: Head, num_labels: int, traits: _Traits) -> ModelShape:
    hidden = config.size("hidden_size")
    stem = _stem(head, "model.")
    parts: list[Part] = [Table(f"{stem}embed_tokens", config.size("vocab_size"), hidden)]
    windows = traits.windows or [None] * config.size("num_hidden_layers")
    for index, window in enumerate(windows):
        block = f"{stem}layers.{index}"
        parts.append(Norm(f"{block}.input_layernorm", hidden, bias=False))
        parts += _projected(f"{block}.self_attn", hidden, traits.heads, bias=traits.qkv_bias, window=window)
        width = traits.heads.heads * traits.heads.head_dim
        parts.append(Linear(f"{block}.self_attn.o_proj", width, hidden, bias=traits.out_bias))
        parts.append(Norm(f"{block}.post_attention_layernorm", hidden, bias=False))
        parts += _gated_mlp(f"{block}.mlp", hidden, config.size("intermediate_size"), bias=traits.mlp_bias)
    parts.append(Norm(f"{stem}norm", hidden, bias=False))
    tied = config.flag("tie_word_embeddings", traits.tied)
    parts += _top(config, head, num_labels, hidden, tied_to=f"{stem}embed_tokens" if tied else None)
    return _shape(config, parts)


def _gated_mlp(name: str, hidden: int, inner: int, *, bias: bool) -> list[Part]:
    """Two projections up, one of them through the activation, multiplied, and one down (Shazeer 2020)."""
    return [
        Linear(f"{name}.gate_proj", hidden, inner, bias=bias),
        Linear(f"{name}.up_proj", hidden, inner, bias=bias),
        Activation(f"{name}.act_fn", inner, gated=True),
        Linear(f"{name}.down_proj", inner, hidden, bias=bias),
    ]


def _projected(
    name: str, hidden: int, heads: _Heads, *, bias: bool, window: int | None = None, rotary: bool = True
) -> list[Part]:
    """Queries, keys and values of causal self-attention, and the attention."""
    queries, keys, values = (f"{name}.{letter}_proj" for letter in "qkv")
    return [
        Linear(queries, hidden, heads.heads * heads.head_dim, bias=bias),
        Linear(keys, hidden, heads.key_heads * heads.head_dim, bias=bias),
        Linear(values, hidden, heads.key_heads * heads.head_dim, bias=bias),
        Attention(
            name,
            queries,
            keys,
            values,
            heads=heads.heads,
            key_heads=heads.key_heads,
            head_dim=heads.head_dim,
            causal=True,
            window=window,
            rotary=rotary,
        ),
    ]


def _phi(config: Config, head: Head, num_labels: int) -> ModelShape:
    """Phi-1 to Phi-2 (Li et al. 2023): attention and a plain MLP read the same norm, side by side."""
    if config.flag("qk_layernorm", False):
        raise config.error("qk_layernorm", "false: norms inside attention run once per head, which is not counted")
    hidden, inner = config.size("hidden_size"), config.size("intermediate_size")
    heads = _grouped(config, config.size("num_attention_heads"))
    stem = _stem(head, "model.")
    parts: list[Part] = [Table(f"{stem}embed_tokens", config.size("vocab_size"), hidden)]
    for index in range(config.size("num_hidden_layers")):
        block = f"{stem}layers.{index}"
        parts.append(Norm(f"{block}.input_layernorm", hidden))
        parts += _projected(f"{block}.self_attn", hidden, heads, bias=True)
        parts.append(Linear(f"{block}.self_attn.dense", heads.heads * heads.head_dim, hidden))
        parts += [
            Linear(f"{block}.mlp.fc1", hidden, inner),
            Activation(f"{block}.mlp.activation_fn", inner),
            Linear(f"{block}.mlp.fc2", inner, hidden),
        ]
    parts.append(Norm(f"{stem}final_layernorm", hidden))
    # A tied head of Phi shares the weight alone: its bias stays its own.
    tied = config.flag("tie_word_embeddings", False)
    parts += _top(config, head, num_labels, hidden, bias=True, tied_to=f"{stem}embed_tokens" if tied else None)
    return _shape(config, parts, targets=(*QUERY_AND_VALUE, "fc1", "fc2"))


def _opt(config: Config, head: Head, num_labels: int) -> ModelShape:
    """OPT (Zhang et al. 2022): learned positions, plain MLP, tokens embedded in a width that may be another.

    GPT-3 is read the same way: what the two do differently (sparse attention) changes no shape.
    """
    if not config.flag("layer_norm_elementwise_affine", True):
        raise config.error("layer_norm_elementwise_affine", "true: a norm without weights is not counted")
    hidden, stem = config.size("hidden_size"), _stem(head, "model.") + "decoder."
    width = config.size("word_embed_proj_dim", hidden)
    before = config.flag("do_layer_norm_before", True)
    positions = config.size("max_position_embeddings") + LEARNED_POSITIONS_OFFSET
    parts: list[Part] = [Table(f"{stem}embed_tokens", config.size("vocab_size"), width)]
    parts.append(Table(f"{stem}embed_positions", positions, hidden))
    if width != hidden:
        parts.append(Linear(f"{stem}project_in", width, hidden, bias=False))
    for index in range(config.size("num_hidden_layers")):
        parts += _opt_block(config, f"{stem}layers.{index}", before=before)
    if before and not config.flag("_remove_final_layer_norm", False):
        parts.append(Norm(f"{stem}final_layer_norm", hidden))
    if width != hidden:
        parts.append(Linear(f"{stem}project_out", hidden, width, bias=False))
    tied = config.flag("tie_word_embeddings", True)
    parts += _top(config, head, num_labels, width, tied_to=f"{stem}embed_tokens" if tied else None)
    return _shape(config, parts)


def _opt_block(config: Config, name: str, *, before: bool) -> list[Part]:
    hidden, inner, bias = config.size("hidden_size"), config.size("ffn_dim"), config.flag("enable_bias", True)
    count = config.size("num_attention_heads")
    heads = _Heads(count, count, config.part_of("num_attention_heads", "hidden_size"))
    attended = _projected(f"{name}.self_attn", hidden, heads, bias=bias, rotary=False)
    attended.append(Linear(f"{name}.self_attn.out_proj", hidden, hidden, bias=bias))
    fed: list[Part] = [
        Linear(f"{name}.fc1", hidden, inner, bias=bias),
        Activation(f"{name}.activation_fn", inner),
        Linear(f"{name}.fc2", inner, hidden, bias=bias),
    ]
    norms = Norm(f"{name}.self_attn_layer_norm", hidden), Norm(f"{name}.final_layer_norm", hidden)
    if before:
        return [norms[0], *attended, norms[1], *fed]
    return [*attended, norms[0], *fed, norms[1]]


def _gpt2(config: Config, head: Head, num_labels: int) -> ModelShape:
    """GPT-2 (Radford et al. 2019): queries, keys and values come from one layer, c_attn."""
    if config.flag("add_cross_attention", False):
        raise config.error("add_cross_attention", "false: no encoder stands beside it")
    hidden, stem = config.size("n_embd"), _stem(head, "transformer.")
    inner = config.size("n_inner", 4 * hidden)
    parts: list[Part] = [
        Table(f"{stem}wte", config.size("vocab_size"), hidden),
        Table(f"{stem}wpe", config.size("n_positions"), hidden),
    ]
    for index in range(config.size("n_layer")):
        block = f"{stem}h.{index}"
        fused, heads = f"{block}.attn.c_attn", config.size("n_head")
        width = config.part_of("n_head", "n_embd")
        parts += [
            Norm(f"{block}.ln_1", hidden),
            Linear(fused, hidden, 3 * hidden),
            Attention(f"{block}.attn", fused, fused, fused, heads, heads, width, causal=True),
            Linear(f"{block}.attn.c_proj", hidden, hidden),
            Norm(f"{block}.ln_2", hidden),
            Linear(f"{block}.mlp.c_fc", hidden, inner),
            Activation(f"{block}.mlp.act", inner),
            Linear(f"{block}.mlp.c_proj", inner, hidden),
        ]
    parts.append(Norm(f"{stem}ln_f", hidden))
    tied = config.flag("tie_word_embeddings", True)
    parts += _top(config, head, num_labels, hidden, tied_to=f"{stem}wte" if tied else None)
    return _shape(config, parts, targets=("c_attn",), keys=("n_embd", "n_layer", "n_positions"))


def _stem(head: Head, name: str) -> str:
    """What the names of the stack begin with: nothing in the bare model."""
    return "" if head is Head.NONE else name


def _top(
    config: Config, head: Head, num_labels: int, width: int, *, bias: bool = False, tied_to: str | None = None
) -> list[Part]:
    """The head. Classification scores every token and picks the last one's scores afterwards, so all are computed."""
    if head is Head.LANGUAGE_MODEL:
        vocabulary = config.size("vocab_size")
        return [Linear("lm_head", width, vocabulary, bias=bias, rows=Rows.HEAD, op="head", tied_to=tied_to)]
    if head is Head.CLASSIFICATION:
        return [Linear("score", width, num_labels, bias=False, op="head")]
    return []


def _shape(
    config: Config,
    parts: Sequence[Part],
    *,
    targets: tuple[str, ...] = QUERY_AND_VALUE,
    keys: tuple[str, str, str] = ("hidden_size", "num_hidden_layers", "max_position_embeddings"),
) -> ModelShape:
    hidden, layers, positions = keys
    return ModelShape(
        name=config.name,
        model_type=config.model_type,
        parts=tuple(parts),
        hidden=config.size(hidden),
        layers=config.size(layers),
        max_length=config.size(positions),
        vocabulary=config.size("vocab_size"),
        usual_targets=targets,
        stored_bits=config.stored_bits,
        decoder=True,
    )


READERS: dict[str, Callable[[Config, Head, int], ModelShape]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "mistral": _mistral,
    "gemma": _gemma,
    "phi": _phi,
    "opt": _opt,
    "gpt2": _gpt2,
}
"""Readers by model_type. Each takes a config, the head on top and the number of labels, and raises ModelError."""
