"""Which quantizers and gates each layer of Bayesian-LoRA has of its own, and how many ranges a weight has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rankbits.accounting.spec import Granularity, Linear, MethodSpec
from rankbits.errors import ModelError
from rankbits.records import SITES

PROBABILITIES = "probabilities"
"""The site of what a softmax makes of scores; it belongs to the layer of the values."""
ACTIVATION_SITES = frozenset({"input", "down_output", "diagonal_output", "output", PROBABILITIES})
"""Quantizers of activations: their ranges come with no weight, so they are kept by themselves."""
GATES_PER_QUANTIZER = 4
"""One for each width above 2: 4, 8, 16 and 32 bits (Bayesian-LoRA, Eq. 5)."""
HEAD_SITES = ("weight", "input")
"""Quantizers of a linear layer that is trained in full."""
PROJECTIONS = (
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
)
"""Last names of the layers of one block that make queries, keys and values, as the tuner knows them."""
READERS_OF_ONE_TENSOR = (
    *map(frozenset, PROJECTIONS),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"wi_0", "wi_1"}),
    frozenset({"w1", "w3"}),
    frozenset({"add_q_proj", "add_k_proj", "add_v_proj"}),
)
"""Names of layers of one block that read the same tensor, as the tuner groups them."""
QUERIES = frozenset(queries for queries, _, _ in PROJECTIONS)
CROSS_ATTENTION = ("encdecattention", "encoder_attn", "crossattention", "cross_attn")
"""Blocks in which queries read another tensor than keys and values."""


@dataclass(frozen=True, slots=True)
class Owned:
    """Sites of one layer, in the order of the method's.

    Args:
        quantizers: those whose quantizer, and so whose range, belongs to this layer.
        gates: those whose width gates belong to it.
        attended: those that act where an attention reads the layer's output.
    """

    quantizers: tuple[str, ...]
    gates: tuple[str, ...]
    attended: tuple[str, ...] = ()


def sites_of(layers: Sequence[Linear], spec: MethodSpec) -> dict[str, tuple[str, ...]]:
    """The sites that have a quantizer in each adapted layer, by its name, in their usual order.

    Args:
        layers: all adapted layers.
        spec: the method.
    """
    attended = _attended(layers, spec)
    found = {linear.name: spec.sites for linear in layers}
    for name, more in attended.items():
        found[name] = tuple(site for site in SITES if site in spec.sites or site in more)
    return found


def _attended(layers: Sequence[Linear], spec: MethodSpec) -> dict[str, tuple[str, ...]]:
    """The sites of each projection of a quantized attention at which the attention itself rounds."""
    if not spec.quantizes_attention:
        return {}
    found: dict[str, tuple[str, ...]] = {}
    names = {linear.name for linear in layers}
    for linear in layers:
        block, _, own = linear.name.rpartition(".")
        group = next((projections for projections in PROJECTIONS if own in projections), None)
        if group is not None and names.issuperset(f"{block}.{name}".lstrip(".") for name in group):
            found[linear.name] = ("output", PROBABILITIES) if own == group[-1] else ("output",)
    return found


def owned(layers: Sequence[Linear], spec: MethodSpec) -> dict[str, Owned]:
    """The sites that each adapted layer owns, by its name.

    Of layers that read one tensor the first owns the quantizer of the input, if inputs are shared, and the gates of
    the weight, if widths are tied; the ranges of weights are always their own.

    Args:
        layers: all adapted layers, in running order.
        spec: the method.
    """
    shares = ({"input"} if spec.share_inputs else set()) | ({"weight"} if spec.tie_groups else set())
    found: dict[str, Owned] = {}
    chosen, attended = sites_of(layers, spec), _attended(layers, spec)
    seen: set[tuple[str, frozenset[str]]] = set()
    for linear in layers:
        readers = _readers(linear.name)
        theirs = shares if readers in seen else set()
        seen.add(readers)
        sites = chosen[linear.name]
        gates = tuple(site for site in sites if site not in theirs)
        quantizers = tuple(site for site in sites if site == "weight" or site in gates)
        found[linear.name] = Owned(quantizers, gates, attended.get(linear.name, ()))
    return found


def _readers(name: str) -> tuple[str, frozenset[str]]:
    """Block and last names of the layers that read what this one reads; itself alone outside known groups."""
    block, _, own = name.rpartition(".")
    group = next((names for names in READERS_OF_ONE_TENSOR if own in names), frozenset({own}))
    if any(mark in block.lower() for mark in CROSS_ATTENTION):
        group = group & QUERIES if own in QUERIES else group - QUERIES
    return block, group


def range_shape(linear: Linear, site: str, spec: MethodSpec) -> tuple[int, ...]:
    """Shape of the ranges of one quantizer.

    Returns:
        (1,); for weights also (d_out, 1) or (d_out, d_in / group, 1), for inputs (d_in / group, 1).

    Raises:
        ModelError: the size of a group does not divide the inputs of the layer.
    """
    finer = {"weight": spec.granularity, "input": spec.input_granularity}
    granularity = finer.get(site, Granularity.TENSOR)
    if granularity is Granularity.TENSOR:
        return (1,)
    if granularity is Granularity.CHANNEL:
        return (linear.d_out, 1)
    if spec.group_size < 1 or linear.d_in % spec.group_size:
        raise ModelError(
            f"group_size: given {spec.group_size} for {linear.name}, expected a divisor of its {linear.d_in} inputs"
        )
    groups = (linear.d_in // spec.group_size, 1)
    return groups if site == "input" else (linear.d_out, *groups)


def ranges(linear: Linear, site: str, spec: MethodSpec) -> int:
    """How many ranges one quantizer has. Raises ModelError as `range_shape` does."""
    count = 1
    for size in range_shape(linear, site, spec):
        count *= size
    return count


def bounds(linear: Linear, site: str, spec: MethodSpec) -> int:
    """How many numbers are kept of the ranges of one quantizer. Raises ModelError as `range_shape` does."""
    return ranges(linear, site, spec) * (2 if site == "input" and spec.affine_inputs else 1)


def kept_activations(linear: Linear, own: Owned, spec: MethodSpec) -> Iterator[str]:
    """Own quantizers of activations that have a width: the learned ones, or all where none is given."""
    chosen = spec.widths.get(linear.name, own.quantizers)
    yield from (site for site in own.quantizers if site in ACTIVATION_SITES and site in chosen)
