"""Bytes of weights at rest: which are held at which width, and which tensors are trained."""

from __future__ import annotations

from collections.abc import Iterator

from rankbits.accounting.params import count, head_count, layer_count, quantized_heads, targeted, tensor_sizes
from rankbits.accounting.quantizers import owned
from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.spec import Linear, Method, MethodSpec, ModelShape
from rankbits.accounting.trained import trained_in_full
from rankbits.accounting.widths import four_bit_layers

FLOAT = 4
INDEX_BYTES = 8
NF4_BLOCK = 64
SCALE_BLOCK = 256
NF4_CODE_BYTES = 16 * FLOAT
SCALE_CODE_BYTES = 256 * FLOAT


def nf4_bytes(elements: int, *, double: bool = False) -> int:
    """Bytes of one weight in 4-bit NormalFloat as bitsandbytes stores it (Dettmers et al. 2023, section 3).

    Two codes a byte, a scale for each block of 64 (fp32: 0.5 bit a weight), and the table of 16 values. Double
    quantization holds scales in 8 bits, with an fp32 scale for each 256 of them, one offset and a table of 256 values:
    0.126953125 bit a weight.
    """
    blocks = -(-elements // NF4_BLOCK)
    codes = -(-elements // 2) + NF4_CODE_BYTES
    if not double:
        return codes + blocks * FLOAT
    return codes + blocks + -(-blocks // SCALE_BLOCK) * FLOAT + FLOAT + SCALE_CODE_BYTES


def weights_bytes(shape: ModelShape, spec: MethodSpec, settings: TrainingSettings) -> int:
    """Bytes of all weights at rest: the base at its width, adapters in fp32.

    Tables, norms, biases and heads of a 4-bit base stay in half or full precision, and adapters are never 4-bit: PEFT
    holds them in fp32 beside any base, and a copy of each module that is trained in full beside the original.

    Raises:
        ModelError: the method's targets match nothing.
    """
    quantized = four_bit_layers(shape, spec) if settings.base in {"nf4", "nf4-double"} else frozenset[str]()
    total = sum(adapter_sizes(shape, spec)) * FLOAT + count(shape, spec).stored_indices * INDEX_BYTES
    for part in shape.parts:
        sizes = tensor_sizes(part)
        if part.name in quantized:
            total += nf4_bytes(sizes[0], double=settings.base == "nf4-double")
            sizes = sizes[1:]
        total += sum(sizes) * settings.base_bytes
    total += sum(linear.d_out * linear.d_in for linear in offset_weights(shape, spec) if linear.name not in quantized)
    if keeps_original(spec):
        total += sum(trained_sizes(shape, spec)) * settings.base_bytes
    return total


def offset_weights(shape: ModelShape, spec: MethodSpec) -> list[Linear]:
    """Adapted layers whose weights have a byte for each number beside them: the offset of its code."""
    return targeted(shape, spec) if spec.compensated and "weight" in spec.sites else []


def keeps_original(spec: MethodSpec) -> bool:
    """Whether the base stays as it was and what is trained stands beside it: adapters, and copies of whole modules."""
    return spec.method not in {Method.FULL, Method.TOP_LAYER, Method.FEATURE_BASED}


def trained_sizes(shape: ModelShape, spec: MethodSpec) -> list[int]:
    """Elements of each weight trained in full, a weight that two trained parts share once."""
    trained = trained_in_full(shape, spec)
    # A module that PEFT copies is a weight of its own, tied or not.
    shared = frozenset[str]() if keeps_original(spec) else trained
    return [
        size
        for part in shape.parts
        if part.name in trained
        for size in tensor_sizes(part, tied_is_free=isinstance(part, Linear) and part.tied_to in shared)
    ]


def adapter_sizes(shape: ModelShape, spec: MethodSpec) -> Iterator[int]:
    """Elements of each trained tensor of the adapters; small ones (gates, ranges, E) as one."""
    layers = targeted(shape, spec)
    own = owned(layers, spec)
    for linear in layers:
        found = layer_count(linear, spec, own[linear.name])
        # MoRA's one matrix may have exactly as many elements as LoRA's two.
        if spec.method is not Method.MORA and found.adapter == spec.rank * (linear.d_in + linear.d_out):
            yield from (spec.rank * linear.d_in, spec.rank * linear.d_out)
        else:
            yield found.adapter
        yield found.diagonal + found.gates + found.ranges
    for linear in quantized_heads(shape, spec):
        found = head_count(linear, spec)
        yield found.gates + found.ranges
    if not layers:
        yield count(shape, spec).adapter
