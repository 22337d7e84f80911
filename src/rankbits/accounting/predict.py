"""One CostRecord from a model's shape alone: what a forward pass will cost before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from rankbits.accounting.macs import elements, products
from rankbits.accounting.methods import (
    FIXED_DOWN,
    FIXED_UP,
    LOW_RANK,
    WITH_DIAGONAL,
    active_rank,
    adapted_ends,
    bottleneck_width,
    can_merge,
)
from rankbits.accounting.mora import mora_side
from rankbits.accounting.params import count, quantized_heads, targeted
from rankbits.accounting.quantizers import Owned, bounds, kept_activations, owned, ranges
from rankbits.accounting.spec import Convolution, Linear, Method, MethodSpec, ModelShape, Norm, Table
from rankbits.accounting.weights import NF4_BLOCK
from rankbits.accounting.widths import FOUR_BIT_BASES, four_bit_layers
from rankbits.records import CostRecord, CountOptions, WeightRecord
from rankbits.records.costs import Width

INDEX_BITS: Width = 32


def predict(shape: ModelShape, options: CountOptions, spec: MethodSpec | None = None) -> CostRecord:
    """What one forward pass costs, with the weights it needs.

    Args:
        shape: the model.
        options: lengths, batch, what is counted.
        spec: the method that adapted it; None is the base model.

    Raises:
        ModelError: a length does not suit the model, or the method does not suit it.
    """
    return CostRecord(
        options=options,
        products=products(shape, options, spec),
        reference_macs=sum(product.macs for product in products(shape, options)),
        elements=elements(shape, options, spec),
        weights=list(weights(shape, options, spec)),
    )


def weights(shape: ModelShape, options: CountOptions, spec: MethodSpec | None = None) -> Iterator[WeightRecord]:
    """Every tensor that inference keeps, with its width: look-up tables where the options count them.

    Floats are `options.float_bits` wide. A merged weight is a float, because the sum of two grids lies on none. One
    whose quantizer rounds the sum is on its grid once it is merged, with its ranges, and a float before.
    """
    unmerged = spec is not None and (options.adapters == "unmerged" or not can_merge(spec.method))
    on_grid = spec is not None and unmerged != spec.rounds_sum
    layers = targeted(shape, spec) if spec is not None and (unmerged or on_grid) else []
    own = owned(layers, spec) if spec is not None else {}
    heads = {linear.name for linear in quantized_heads(shape, spec)} if spec is not None else set()
    four_bit = spec is not None and unmerged and spec.method in FOUR_BIT_BASES
    narrow = four_bit_layers(shape, spec) if spec is not None and four_bit else frozenset[str]()
    for part in shape.parts:
        if isinstance(part, Linear):
            yield from _linear(part, options, spec if on_grid or part.name in heads else None, narrow)
            if spec is not None and part.name in heads:
                yield WeightRecord(module=part.name, operand="ranges", elements=bounds(part, "input", spec), bits=32)
            if spec is not None and part.name in own:
                yield from _adapter(part, spec, options.float_bits) if unmerged else ()
                yield from _ranges(part, spec, own[part.name], adapter="default" if unmerged else None)
        elif isinstance(part, Convolution):
            volume = part.c_in * part.c_out // part.groups * prod(part.kernel)
            yield WeightRecord(module=part.name, operand="W0", elements=volume, bits=options.float_bits)
            if part.bias:
                yield WeightRecord(module=part.name, operand="bias", elements=part.c_out, bits=options.float_bits)
        elif isinstance(part, Norm):
            size = part.width * (2 if part.bias else 1)
            yield WeightRecord(module=part.name, operand="norm", elements=size, bits=options.float_bits)
        elif isinstance(part, Table) and options.embeddings == "in":
            size = part.entries * part.width
            yield WeightRecord(module=part.name, operand="table", elements=size, bits=options.float_bits)
    if spec is not None and unmerged:
        yield from _between_layers(shape, spec, options.float_bits)


def _linear(
    linear: Linear, options: CountOptions, spec: MethodSpec | None, narrow: frozenset[str]
) -> Iterator[WeightRecord]:
    size, floats = linear.d_in * linear.d_out, options.float_bits
    if linear.tied_to is None or options.embeddings == "out":
        # A head that shares the table's weight needs it even where tables are not counted.
        if linear.name in narrow:
            yield WeightRecord(module=linear.name, operand="W0", elements=size, bits=4, scales=-(-size // NF4_BLOCK))
        else:
            yield _tensor(linear, "W0", size, "weight", spec, floats)
    if linear.bias:
        yield WeightRecord(module=linear.name, operand="bias", elements=linear.d_out, bits=floats)


def _adapter(linear: Linear, spec: MethodSpec, floats: int) -> Iterator[WeightRecord]:
    rank, method = active_rank(linear, spec), spec.method
    sizes: list[tuple[str, int, str]] = []
    if method in LOW_RANK or method in FIXED_UP:
        sizes.append(("A", rank * linear.d_in, "down"))
    if method in WITH_DIAGONAL:
        sizes.append(("E", rank, "diagonal"))
    if method in LOW_RANK or method in FIXED_DOWN:
        sizes.append(("B", rank * linear.d_out, "up"))
    if method in {Method.DORA, Method.QDORA}:
        sizes.append(("magnitude", linear.d_out, ""))
    if method is Method.MORA:
        sizes.append(("M", mora_side(linear, spec) ** 2, ""))
    for operand, size, site in sizes:
        yield _tensor(linear, operand, size, site, spec, floats).model_copy(update={"adapter": "default"})
    if method in FIXED_DOWN | FIXED_UP:
        yield WeightRecord(module=linear.name, operand="indices", elements=rank, bits=INDEX_BITS, adapter="default")


def _ranges(linear: Linear, spec: MethodSpec, own: Owned, *, adapter: str | None) -> Iterator[WeightRecord]:
    """Ranges that come with no packed weight: of activations, and of a sum that is rounded at each call."""
    kept = sum(bounds(linear, site, spec) for site in kept_activations(linear, own, spec))
    if spec.rounds_sum and adapter is not None:
        kept += ranges(linear, "weight", spec)
    if kept:
        yield WeightRecord(module=linear.name, operand="ranges", elements=kept, bits=32, adapter=adapter)


def _between_layers(shape: ModelShape, spec: MethodSpec, floats: Width) -> Iterator[WeightRecord]:
    """What methods keep that do not sit on single layers: bottlenecks where sub-layers end, a prefix, a prompt."""
    for end in adapted_ends(shape, spec):
        hidden, width = end.linear.d_out, bottleneck_width(shape, spec)
        for operand, size in (("D", hidden * width), ("U", width * hidden), ("bias", width + hidden)):
            yield WeightRecord(module=end.linear.name, operand=operand, elements=size, bits=floats, adapter="default")
    if spec.method in {Method.PREFIX, Method.PROMPT}:
        size = count(shape, spec).adapter
        yield WeightRecord(module=shape.name, operand="virtual tokens", elements=size, bits=floats, adapter="default")


def _tensor(linear: Linear, operand: str, size: int, site: str, spec: MethodSpec | None, floats: int) -> WeightRecord:
    widths = spec.widths.get(linear.name, {}) if spec is not None else {}
    width = widths.get(site)
    return WeightRecord.model_validate(
        {
            "module": linear.name,
            "operand": operand,
            "elements": size,
            "bits": floats if width is None else width,
            "scales": 0 if width is None or spec is None else ranges(linear, site, spec),
            "scale_bits": spec.scale_bits if spec is not None and width is not None and site == "weight" else 32,
        }
    )
