"""Which quantizers and gates each layer of Bayesian-LoRA has of its own, and how many ranges a weight has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rankbits.accounting.spec import Granularity, Linear, MethodSpec
from rankbits.errors import ModelError

ACTIVATION_SITES = frozenset({"input", "down_output", "diagonal_output", "output"})
"""Quantizers of activations: their ranges come with no weight, so they are kept by themselves."""
GATES_PER_QUANTIZER = 4
"""One for each width above 2: 4, 8, 16 and 32 bits (Bayesian-LoRA, Eq. 5)."""
READERS_OF_ONE_TENSOR = (
    frozenset({"query", "key", "value"}),
    frozenset({"query_proj", "key_proj", "value_proj"}),
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"q_lin", "k_lin", "v_lin"}),
    frozenset({"q", "k", "v"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"wi_0", "wi_1"}),
    frozenset({"w1", "w3"}),
)
"""Names of layers of one block that read the same tensor, as the tuner groups them."""
QUERIES = frozenset({"query", "query_proj", "q_proj", "q_lin", "q"})
CROSS_ATTENTION = ("encdecattention", "encoder_attn", "crossattention", "cross_attn")
"""Blocks in which queries read another tensor than keys and values."""


@dataclass(frozen=True, slots=True)
class Owned:
    """Sites of one layer, in the order of the method's.

    Args:
        quantizers: those whose quantizer, and so whose range, belongs to this layer.
        gates: those whose width gates belong to it.
    """

    quantizers: tuple[str, ...]
    gates: tuple[str, ...]


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
    seen: set[tuple[str, frozenset[str]]] = set()
    for linear in layers:
        readers = _readers(linear.name)
        theirs = shares if readers in seen else set()
        seen.add(readers)
        gates = tuple(site for site in spec.sites if site not in theirs)
        found[linear.name] = Owned(tuple(site for site in spec.sites if site == "weight" or site in gates), gates)
    return found


def _readers(name: str) -> tuple[str, frozenset[str]]:
    """Block and last names of the layers that read what this one reads; itself alone outside known groups."""
    block, _, own = name.rpartition(".")
    group = next((names for names in READERS_OF_ONE_TENSOR if own in names), frozenset({own}))
    if any(mark in block.lower() for mark in CROSS_ATTENTION):
        group = group & QUERIES if own in QUERIES else group - QUERIES
    return block, group


def range_shape(linear: Linear, site: str, spec: MethodSpec) -> tuple[int, ...]:
    """Shape of the ranges of one quantizer: (1,), for weights also (d_out, 1) or (d_out, d_in / group, 1).

    Raises:
        ModelError: the size of a group does not divide the inputs of the layer.
    """
    if site != "weight" or spec.granularity is Granularity.TENSOR:
        return (1,)
    if spec.granularity is Granularity.CHANNEL:
        return (linear.d_out, 1)
    if spec.group_size < 1 or linear.d_in % spec.group_size:
        raise ModelError(
            f"group_size: given {spec.group_size} for {linear.name}, expected a divisor of its {linear.d_in} inputs"
        )
    return (linear.d_out, linear.d_in // spec.group_size, 1)


def ranges(linear: Linear, site: str, spec: MethodSpec) -> int:
    """How many ranges one quantizer has. Raises ModelError as `range_shape` does."""
    count = 1
    for size in range_shape(linear, site, spec):
        count *= size
    return count


def kept_activations(linear: Linear, own: Owned, spec: MethodSpec) -> Iterator[str]:
    """Own quantizers of activations that have a width: the learned ones, or all where none is given."""
    chosen = spec.widths.get(linear.name, spec.sites)
    yield from (site for site in own.quantizers if site in ACTIVATION_SITES and site in chosen)
