"""What each method adds to one forward pass: matrix products, elementwise work, virtual tokens and keys.

An adapter of a linear layer runs wherever that layer runs, at its active rank; a bottleneck adapter runs where a
sub-layer ends; a prefix lengthens what attention sees and a prompt lengthens the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rankbits.accounting.mora import mora_blocks, mora_side
from rankbits.accounting.spec import Activation, Attention, Linear, Method, MethodSpec, ModelShape, Rows
from rankbits.errors import ModelError
from rankbits.records import ElementWork, Product

LOW_RANK = frozenset(
    {
        Method.LORA,
        Method.RSLORA,
        Method.ADALORA,
        Method.DYLORA,
        Method.QLORA,
        Method.DORA,
        Method.QDORA,
        Method.BAYESIAN_LORA,
    }
)
"""Methods with both matrices, A to the rank and B from it."""
WITH_DIAGONAL = frozenset({Method.ADALORA, Method.BAYESIAN_LORA})
WITH_MAGNITUDE = frozenset({Method.DORA, Method.QDORA})
FIXED_DOWN = frozenset({Method.SBORA_FA, Method.QSBORA_FA, Method.MULTI_SBORA})
"""SBoRA that picks inputs and trains B. Several tasks share a layer's inputs; a count is that of one task."""
FIXED_UP = frozenset({Method.SBORA_FB, Method.QSBORA_FB})
"""SBoRA that trains A and picks outputs."""
BOTTLENECKS = frozenset({Method.HOULSBY, Method.PFEIFFER, Method.PARALLEL})
ON_LINEARS = LOW_RANK | FIXED_DOWN | FIXED_UP | {Method.MORA}
"""Methods that adapt single linear layers, which `targets` names."""
UNMERGEABLE = BOTTLENECKS | {Method.PREFIX, Method.PROMPT}

BOTTLENECK_FRACTIONS = {Method.HOULSBY: 16, Method.PFEIFFER: 16, Method.PARALLEL: 2}
"""A bottleneck is this many times narrower than the residual stream, if no width is given."""


@dataclass(frozen=True, slots=True)
class SublayerEnd:
    """The linear layer that a sub-layer ends with; `after_attention` tells attention from feed-forward."""

    linear: Linear
    after_attention: bool


def can_merge(method: Method) -> bool:
    """Whether what the method trains can become part of the base weights and then costs nothing."""
    return method not in UNMERGEABLE


def extra_keys(spec: MethodSpec) -> int:
    """Virtual keys and values that each attention sees besides those of tokens (Li and Liang 2021)."""
    return spec.virtual_tokens if spec.method is Method.PREFIX else 0


def extra_tokens(spec: MethodSpec) -> int:
    """Virtual tokens that run through the whole model before the others (Lester et al. 2021)."""
    return spec.virtual_tokens if spec.method is Method.PROMPT else 0


def active_rank(linear: Linear, spec: MethodSpec) -> int:
    """The rank that runs in a layer: the learned, pruned or chosen one, else the allocated one."""
    return spec.ranks.get(linear.name, spec.rank)


def adapter_products(
    linear: Linear, spec: MethodSpec, rows: int, *, adapter: str = "default", constant: bool = False
) -> list[Product]:
    """Matrix products that the adapter of one linear layer runs beside it, unmerged, 32 bits wide.

    With n rows and active rank a: n a (d_in + d_out) MACs for A and B (Hu et al. 2022), one half of it for SBoRA
    (Po et al. 2024), n s^2 for MoRA, or ceil(min(d_in, d_out) / s) times that where it rotates: blocks of the input
    whose results would be cut off are not multiplied. DoRA as PEFT runs it multiplies an identity through A and B at
    each call for the norm of the weight: r d_in (d_in + d_out) more, which does not depend on the input.

    Args:
        linear: the layer, which the caller knows to be adapted.
        spec: the method; methods that do not sit on linear layers give nothing.
        rows: rows of this call, at least 1.
        adapter: its name.
        constant: whether the rows are a table and not this call's input.

    Raises:
        ModelError: MoRA's matrix would be larger than the layer.
    """
    return [
        Product(
            module=linear.name,
            op=op,
            batch=1,
            m=m,
            k=k,
            n=n,
            left=left,
            right=right,
            kind="weight",
            constant=fixed,
            adapter=adapter,
        )
        for op, left, right, (m, k, n), fixed in _shapes(linear, spec, rows, constant=constant)
        # A layer pruned to rank 0 multiplies nothing.
        if min(m, k, n)
    ]


def _shapes(
    linear: Linear, spec: MethodSpec, rows: int, *, constant: bool
) -> Iterator[tuple[str, str, str, tuple[int, int, int], bool]]:
    """Name, operands, sizes m, k and n of each product of an adapter, and whether it does not depend on the input."""
    rank, d_in, d_out = active_rank(linear, spec), linear.d_in, linear.d_out
    if spec.rounds_sum:
        # The update is formed as a matrix at each call, because the quantizer reads its sum with W0.
        yield "lora_merge", "B", "A", (d_out, rank, d_in), True
        return
    if spec.method is Method.MORA:
        side = mora_side(linear, spec)
        yield "mora", "c", "M", (rows * mora_blocks(linear, spec), side, side), constant
    if spec.method in LOW_RANK or spec.method in FIXED_UP:
        yield "lora_down", "x", "A", (rows, d_in, rank), constant
    if spec.method in LOW_RANK:
        yield "lora_up", "h", "B", (rows, rank, d_out), constant
    if spec.method in FIXED_DOWN:
        yield "lora_up", "x", "B", (rows, rank, d_out), constant
    if spec.method in WITH_MAGNITUDE:
        yield "dora_down", "identity", "A", (d_in, d_in, rank), True
        yield "dora_up", "A^T", "B", (d_in, rank, d_out), True


def adapter_elements(linear: Linear, spec: MethodSpec, rows: int) -> list[ElementWork]:
    """Elementwise work of the adapter of one linear layer on `rows` rows: elements that each step writes.

    Arguments and errors are those of `adapter_products`.
    """
    rank, d_in, d_out = active_rank(linear, spec), linear.d_in, linear.d_out
    work: dict[str, int] = {}
    if spec.rounds_sum:
        size = d_in * d_out
        work = {"diagonal": d_out * rank, "adapter_scale": size, "adapter_add": size, "weight_quantizer": size}
    elif spec.method in LOW_RANK or spec.method in FIXED_DOWN:
        work = {"adapter_scale": rows * d_out, "adapter_add": rows * d_out}
    if spec.method in FIXED_DOWN:
        work["gather"] = rows * rank
    if spec.method in FIXED_UP:
        work = {"adapter_scale": rows * rank, "scatter": rows * rank}
    if spec.method in WITH_DIAGONAL and not spec.rounds_sum:
        work["diagonal"] = rows * rank
    if spec.method in WITH_MAGNITUDE:
        # The base's own output is scaled too, and the updated weight is written before its norm is taken.
        work["adapter_scale"] += rows * d_out
        work["weight_norm"] = d_in * d_out
    if spec.method is Method.MORA:
        side = mora_side(linear, spec)
        squeezed = rows * mora_blocks(linear, spec) * side
        work = {"compress": squeezed, "expand": rows * d_out, "adapter_add": rows * d_out}
    return [ElementWork(module=linear.name, op=op, elements=elements) for op, elements in work.items()]


def bottleneck_width(shape: ModelShape, spec: MethodSpec) -> int:
    """Width of a bottleneck adapter: the given one, or the method's usual fraction of the hidden size.

    Raises:
        ModelError: the given one is below 1.
    """
    if spec.width is None:
        return max(1, shape.hidden // BOTTLENECK_FRACTIONS[spec.method])
    if spec.width < 1:
        raise ModelError(f"width: given {spec.width} for {spec.method.value}, expected at least 1")
    return spec.width


def adapted_ends(shape: ModelShape, spec: MethodSpec) -> list[SublayerEnd]:
    """Where bottleneck adapters sit: Houlsby's where self-attention and feed-forward end, others at the latter alone.

    A sub-layer ends with the linear layer that directly follows an attention or an activation on tokens; a
    cross-attention gets no adapter, so that every block has at most two. Other methods have none.

    Raises:
        ModelError: the model has no feed-forward that ends so.
    """
    if spec.method not in BOTTLENECKS:
        return []
    ends = list(_ends(shape))
    if not any(not end.after_attention for end in ends):
        raise ModelError(
            f"{spec.method.value}: {shape.name} has no feed-forward (an activation on tokens and a linear layer after "
            "it), so there is no place for its adapters"
        )
    return [end for end in ends if spec.method is Method.HOULSBY or not end.after_attention]


def _ends(shape: ModelShape) -> Iterator[SublayerEnd]:
    for before, part in zip(shape.parts, shape.parts[1:], strict=False):
        if not isinstance(part, Linear) or part.op == "head" or part.d_out != shape.hidden:
            continue
        if isinstance(before, Attention) and before.rows is before.over:
            yield SublayerEnd(part, after_attention=True)
        if isinstance(before, Activation) and before.rows in {Rows.TOKENS, Rows.SOURCE} and part.rows is before.rows:
            yield SublayerEnd(part, after_attention=False)


def sublayer_products(
    shape: ModelShape, spec: MethodSpec, tokens: int, source: int = 0, *, adapter: str = "default"
) -> list[Product]:
    """Matrix products of bottleneck adapters: 2 n d w MACs where a sub-layer of hidden width d ends.

    Houlsby et al. 2019, Pfeiffer et al. 2021, He et al. 2022 (parallel). Other methods give nothing.

    Args:
        shape: the model.
        spec: the method.
        tokens: rows that are computed, of the decoder if there are two stacks.
        source: rows of the encoder if there are two stacks.
        adapter: its name.

    Raises:
        ModelError: the model has no place for them, or the width is below 1.
    """
    listed = []
    for end in adapted_ends(shape, spec):
        rows = source if end.linear.rows is Rows.SOURCE else tokens
        hidden, width = end.linear.d_out, bottleneck_width(shape, spec)
        for op, left, right, k, n in (
            ("adapter_down", "y", "D", hidden, width),
            ("adapter_up", "h", "U", width, hidden),
        ):
            if rows:
                listed.append(
                    Product(
                        module=end.linear.name,
                        op=op,
                        batch=1,
                        m=rows,
                        k=k,
                        n=n,
                        left=left,
                        right=right,
                        kind="weight",
                        adapter=adapter,
                    )
                )
    return listed


def sublayer_elements(shape: ModelShape, spec: MethodSpec, tokens: int, source: int = 0) -> list[ElementWork]:
    """Elementwise work of bottleneck adapters: biases, activation, residual, and each method's own step.

    Pfeiffer's runs the layer norm a second time; a parallel one scales its output. Arguments and errors are those of
    `sublayer_products`.
    """
    own = {Method.PFEIFFER: "norm", Method.PARALLEL: "adapter_scale"}
    work = []
    for end in adapted_ends(shape, spec):
        rows = source if end.linear.rows is Rows.SOURCE else tokens
        hidden, width = end.linear.d_out, bottleneck_width(shape, spec)
        steps = {"bias": width + hidden, "activation": width, "adapter_add": hidden}
        if spec.method in own:
            steps[own[spec.method]] = hidden
        work += [ElementWork(module=end.linear.name, op=op, elements=rows * size) for op, size in steps.items()]
    return work
