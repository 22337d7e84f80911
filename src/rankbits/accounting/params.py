"""How many parameters a model has and a method trains, and which layers its targets mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import prod

from rankbits.accounting.methods import (
    FIXED_DOWN,
    FIXED_UP,
    ON_LINEARS,
    WITH_DIAGONAL,
    WITH_MAGNITUDE,
    adapted_ends,
    bottleneck_width,
)
from rankbits.accounting.mora import mora_side
from rankbits.accounting.quantizers import (
    GATES_PER_QUANTIZER,
    HEAD_SITES,
    PROBABILITIES,
    Owned,
    owned,
    ranges,
    sites_of,
)
from rankbits.accounting.spec import Convolution, Linear, Method, MethodSpec, ModelShape, Norm, Part, Rows, Table
from rankbits.accounting.trained import NOT_ALL_LINEAR, above_body, inside, is_head, top_blocks
from rankbits.errors import ModelError


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """What receives gradients, by group.

    Args:
        adapter: the matrices of adapters, magnitudes, biases of bottlenecks, virtual tokens.
        diagonal: entries of E between B and A.
        gates: logits of rank gates and of bit-width gates.
        ranges: one per quantizer, for weights one per channel or group where ranges are that fine.
        head: modules trained and saved in full.
        base: weights of the pre-trained model itself.
        stored_indices: integers that are kept with the adapter and not trained.
    """

    adapter: int = 0
    diagonal: int = 0
    gates: int = 0
    ranges: int = 0
    head: int = 0
    base: int = 0
    stored_indices: int = 0

    @property
    def trainable(self) -> int:
        """All that receives gradients."""
        return self.adapter + self.diagonal + self.gates + self.ranges + self.head + self.base

    @property
    def paper(self) -> int:
        """Adapter matrices alone, as papers count: no E, gates, ranges or head."""
        return self.adapter

    def __add__(self, other: ParameterCount) -> ParameterCount:
        """Group by group."""
        return ParameterCount(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def base_parameters(shape: ModelShape) -> int:
    """All parameters of the model; a weight that is tied to a table is counted with the table."""
    return _elements(shape.parts, tied_is_free=True)


def count(shape: ModelShape, spec: MethodSpec) -> ParameterCount:
    """Parameters that a method trains in a model, at the allocated rank.

    One linear layer from d_in to d_out: r(d_in + d_out) for LoRA (Hu et al. 2022) and what grows from it, + d_out for
    DoRA (Liu et al. 2024), r d_out or r d_in for SBoRA (Po et al. 2024), s^2 for MoRA (Jiang et al. 2024), and for
    Bayesian-LoRA r + (r - 1) + 4 per quantizer and its ranges more. What layers share counts once: the quantizer of an
    input that they read, the gates of tied weights. A bottleneck of width w on hidden size d: 2 d w + w + d. A prefix
    of n tokens: 2 n times the widths of all keys; a prompt: n d per stack.

    Raises:
        ModelError: targets or modules trained in full match nothing; a size is below 1 or larger than the layer.
    """
    total = ParameterCount(head=_parameters_of(shape, spec.trained_in_full))
    if spec.method in ON_LINEARS:
        layers = targeted(shape, spec)
        own = owned(layers, spec)
        for linear in layers:
            total += layer_count(linear, spec, own[linear.name])
        return sum((head_count(linear, spec) for linear in quantized_heads(shape, spec)), start=total)
    if spec.method is Method.FULL:
        return ParameterCount(base=base_parameters(shape))
    if spec.method in {Method.TOP_LAYER, Method.FEATURE_BASED}:
        head = total.head or _head(shape, spec)
        blocks = _elements(top_blocks(shape, spec.layers), tied_is_free=True) if spec.method is Method.TOP_LAYER else 0
        return ParameterCount(head=head, base=blocks)
    return total + ParameterCount(adapter=_between_layers(shape, spec))


def layer_count(linear: Linear, spec: MethodSpec, own: Owned) -> ParameterCount:
    """What the adapter of one linear layer trains.

    Args:
        linear: the layer.
        spec: the method.
        own: which quantizers and gates are this layer's own.

    Raises:
        ModelError: the rank is below 1 or more than the layer can have; groups of ranges do not divide its inputs.
    """
    rank, d_in, d_out = spec.rank, linear.d_in, linear.d_out
    _check_rank(linear, spec)
    if spec.method is Method.MORA:
        return ParameterCount(adapter=mora_side(linear, spec) ** 2)
    if spec.method in FIXED_DOWN:
        return ParameterCount(adapter=rank * d_out, stored_indices=rank)
    if spec.method in FIXED_UP:
        return ParameterCount(adapter=rank * d_in, stored_indices=rank)
    magnitude = d_out if spec.method in WITH_MAGNITUDE else 0
    matrices = ParameterCount(
        adapter=rank * (d_in + d_out) + magnitude, diagonal=rank if spec.method in WITH_DIAGONAL else 0
    )
    if spec.method is not Method.BAYESIAN_LORA:
        return matrices
    rank_gates = rank - 1 if spec.learn_rank else 0
    return matrices + ParameterCount(
        gates=rank_gates + GATES_PER_QUANTIZER * len(own.gates),
        ranges=sum(ranges(linear, site, spec) for site in own.quantizers),
    )


def head_count(linear: Linear, spec: MethodSpec) -> ParameterCount:
    """Gates and ranges of one quantized linear layer of a head. Raises ModelError as `layer_count` does for groups."""
    return ParameterCount(
        gates=GATES_PER_QUANTIZER * len(HEAD_SITES), ranges=sum(ranges(linear, site, spec) for site in HEAD_SITES)
    )


def quantized_heads(shape: ModelShape, spec: MethodSpec) -> list[Linear]:
    """The linear layers that are trained in full and have quantizers, in running order; none for most methods."""
    if spec.method is not Method.BAYESIAN_LORA or not spec.quantize_head:
        return []
    return [linear for linear in shape.linears() if inside(linear.name, spec.trained_in_full)]


def check_head(shape: ModelShape, spec: MethodSpec) -> None:
    """Raise ModelError if a method quantizes a head, and no linear layer is trained in full."""
    if spec.method is Method.BAYESIAN_LORA and spec.quantize_head and not quantized_heads(shape, spec):
        raise ModelError(
            f"quantize_head: no linear layer of {shape.name} is trained in full; name the head in modules_to_save"
        )


def _check_rank(linear: Linear, spec: MethodSpec) -> None:
    limits = {
        Method.BAYESIAN_LORA: min(linear.d_in, linear.d_out),
        **dict.fromkeys(FIXED_DOWN, linear.d_in),
        **dict.fromkeys(FIXED_UP, linear.d_out),
    }
    limit = limits.get(spec.method)
    if spec.rank < 1 or (limit is not None and spec.rank > limit):
        allowed = "at least 1" if limit is None else f"1 to {limit}"
        raise ModelError(f"rank: given {spec.rank} for {spec.method.value} on {linear.name}, expected {allowed}")


def _between_layers(shape: ModelShape, spec: MethodSpec) -> int:
    """Parameters of methods that do not sit on single layers: bottlenecks, prefix, prompt."""
    if spec.method in {Method.PREFIX, Method.PROMPT} and spec.virtual_tokens < 1:
        raise ModelError(f"virtual_tokens: given {spec.virtual_tokens} for {spec.method.value}, expected at least 1")
    if spec.method is Method.PROMPT:
        return spec.virtual_tokens * shape.hidden * (2 if shape.two_stacks else 1)
    if spec.method is Method.PREFIX:
        # The decoder's, where there are two stacks: keys of the source have no place for a prefix in PEFT's cache.
        kept = [a for a in shape.attentions() if a.rows is Rows.TOKENS and a.over is Rows.TOKENS]
        return 2 * spec.virtual_tokens * sum(a.key_heads * a.head_dim for a in kept)
    width = bottleneck_width(shape, spec) if (ends := adapted_ends(shape, spec)) else 0
    return sum(2 * end.linear.d_out * width + width + end.linear.d_out for end in ends)


def targeted(shape: ModelShape, spec: MethodSpec) -> list[Linear]:
    """The linear layers that a method adapts, in running order, by PEFT's rules.

    A list of names matches whole names or their ends at a dot; a string is a regular expression for the whole name;
    "all-linear" is every linear layer but the output head and classification heads; None takes the model's usual ones.
    Modules trained in full are never adapted. Methods that do not adapt linear layers have none.

    Raises:
        ModelError: there is no usual target, or a target matches no layer, or one that is not linear; the names that
            exist are listed.
    """
    if spec.method not in ON_LINEARS:
        return []
    targets = shape.usual_targets if spec.targets is None else spec.targets
    candidates = [linear for linear in shape.linears() if not inside(linear.name, spec.trained_in_full)]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return [linear for linear in candidates if not is_head(linear, NOT_ALL_LINEAR)]
    wanted = [targets] if isinstance(targets, str) else [(name,) for name in targets]
    if not wanted:
        raise ModelError(f"targets: none are given and {shape.name} has no usual ones; it has {_last_names(shape)}")
    missing = [target for target in wanted if not any(_matches(linear.name, target) for linear in candidates)]
    if missing:
        named = ", ".join(repr(target if isinstance(target, str) else target[0]) for target in missing)
        raise ModelError(f"targets: {named} matches no linear layer of {shape.name}; it has {_last_names(shape)}")
    _refuse_other_parts(shape, wanted)
    return [linear for linear in candidates if any(_matches(linear.name, target) for target in wanted)]


def check_attention(shape: ModelShape, spec: MethodSpec) -> None:
    """Raise ModelError if a method quantizes attention, and the model's cannot be quantized or is not adapted."""
    if not spec.quantizes_attention:
        return
    apart = [attention.name for attention in shape.attentions() if attention.c2p or attention.p2c]
    if apart:
        raise ModelError(
            f"quantize_attention: {apart[0]} of {shape.name} compares positions by a function of its own; expected "
            "attention that runs through transformers' attention interface"
        )
    if not any(PROBABILITIES in sites for sites in sites_of(targeted(shape, spec), spec).values()):
        raise ModelError(
            f"quantize_attention: no attention of {shape.name} has its queries, keys and values all adapted, each by a "
            "layer of its own; name all three in targets"
        )


def _refuse_other_parts(shape: ModelShape, wanted: Iterable[str | tuple[str, ...]]) -> None:
    others = [part for part in shape.parts if isinstance(part, Convolution | Table)]
    wrong = [part for part in others if any(_matches(part.name, target) for target in wanted)]
    if wrong:
        raise ModelError(
            f"targets: {wrong[0].name} of {shape.name} is a {type(wrong[0]).__name__.lower()}, expected linear layers"
        )


def _matches(name: str, target: str | tuple[str, ...]) -> bool:
    if isinstance(target, tuple):
        return any(name == end or name.endswith(f".{end}") for end in target)
    try:
        return re.fullmatch(target, name) is not None
    except re.error as reason:
        raise ModelError(f"targets: {target!r} is not a regular expression: {reason}") from reason


def _last_names(shape: ModelShape) -> str:
    return ", ".join(sorted({linear.name.rsplit(".", 1)[-1] for linear in shape.linears()}))


def tensor_sizes(part: Part, *, tied_is_free: bool = True) -> list[int]:
    """Elements of each weight of a part; a weight that is tied to a table belongs to the table."""
    match part:
        case Linear():
            weight = [] if tied_is_free and part.tied_to is not None else [part.d_in * part.d_out]
            return [*weight, part.d_out] if part.bias else weight
        case Convolution():
            weight = [part.c_in * part.c_out // part.groups * prod(part.kernel)]
            return [*weight, part.c_out] if part.bias else weight
        case Table():
            return [part.entries * part.width]
        case Norm():
            return [part.width] * (2 if part.bias else 1)
        case _:
            return []


def _elements(parts: Iterable[Part], *, tied_is_free: bool) -> int:
    return sum(size for part in parts for size in tensor_sizes(part, tied_is_free=tied_is_free))


def _parameters_of(shape: ModelShape, modules: Sequence[str]) -> int:
    """Parameters of modules trained in full; each becomes a copy of its own, tied or not."""
    for module in modules:
        if not any(inside(part.name, [module]) for part in shape.parts):
            names = sorted({name for part in shape.parts for name in part.name.split(".") if not name.isdigit()})
            raise ModelError(
                f"trained_in_full: {module!r} matches no module of {shape.name}; it has {', '.join(names)}"
            )
    return _elements((part for part in shape.parts if inside(part.name, modules)), tied_is_free=False)


def _head(shape: ModelShape, spec: MethodSpec) -> int:
    heads = [part for part in shape.parts if inside(part.name, above_body(shape))]
    is_tied = any(is_head(linear) and linear.tied_to is not None for linear in shape.linears())
    if not heads and not (is_tied and spec.method is Method.TOP_LAYER):
        raise ModelError(
            f"{spec.method.value} trains the head, which {shape.name} does not have"
            f"{' for itself: it is the table of embeddings' if is_tied else ': count it with a head'}, or name modules "
            "in trained_in_full"
        )
    return _elements(heads, tied_is_free=False)
