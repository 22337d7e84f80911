"""Matrix products and elementwise work of a model shape: plain integers from sizes, one record per product.

MACs are batch x m x k x n of each product. Bias, scaling, softmax, norms, activations, gathers, residual additions and
rounding are elementwise work, in a list of its own. Attention follows Vaswani et al. 2017, DeBERTa's disentangled
attention He et al. 2021 (Eq. 4), the count of both Bayesian-LoRA, appendix D, with the factors of tokens it leaves out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from math import prod

from rankbits.accounting.methods import (
    adapter_elements,
    adapter_products,
    can_merge,
    extra_keys,
    extra_tokens,
    sublayer_elements,
    sublayer_products,
)
from rankbits.accounting.params import quantized_heads, targeted
from rankbits.accounting.quantizers import PROBABILITIES, Owned, kept_activations, owned
from rankbits.accounting.spec import Activation, Attention, Convolution, Linear, MethodSpec, ModelShape, Norm, Rows
from rankbits.accounting.widths import with_widths
from rankbits.errors import ModelError
from rankbits.records import CountOptions, ElementWork, Product

Span = tuple[int, int, int]
"""Sequences that share an attention of so many query and so many key positions."""


def products(shape: ModelShape, options: CountOptions, spec: MethodSpec | None = None) -> list[Product]:
    """Every matrix product of one forward pass, in running order, with the widths of its operands.

    Args:
        shape: the model.
        options: lengths, batch, and what is counted.
        spec: the method that adapted it; None is the base model. Its adapters are listed where the options ask for
            them unmerged, or where the method has no merged form.

    Raises:
        ModelError: a length does not suit the model, or the method's targets match nothing.
    """
    options, beside, adapted = _resolved(shape, options, spec)
    listed: list[Product] = []
    for part in shape.parts:
        if isinstance(part, Linear):
            listed += _linear_products(part, options)
            if beside is not None and part.name in adapted:
                listed += _products_beside(part, beside, options)
        elif isinstance(part, Convolution):
            listed += _convolution_products(part, options)
        elif isinstance(part, Attention):
            listed += _attention_products(part, options, extra_keys(beside) if beside is not None else 0)
    if beside is not None:
        listed += sublayer_products(shape, beside, *_stack_rows(options))
    return with_widths(listed, shape, spec, merged=beside is None)


def elements(shape: ModelShape, options: CountOptions, spec: MethodSpec | None = None) -> list[ElementWork]:
    """Elementwise work of one forward pass: how many elements each step writes, without empty entries.

    Raises ModelError as `products` does.
    """
    options, beside, _ = _resolved(shape, options, spec)
    quantizing = spec if beside is not None or (spec is not None and spec.rounds_sum) else None
    own = owned(targeted(shape, quantizing), quantizing) if quantizing is not None else {}
    heads = {linear.name for linear in quantized_heads(shape, spec)} if spec is not None else set()
    work: list[ElementWork] = []
    for part in shape.parts:
        work += _part_elements(part, shape.hidden, options)
        if isinstance(part, Linear) and quantizing is not None and part.name in own:
            rows = row_count(part.rows, options) + _position_rows(part, options)
            work += adapter_elements(part, beside, rows) if beside is not None else []
            work += _quantizer_elements(part, quantizing, own[part.name], rows)
        elif isinstance(part, Linear) and part.name in heads:
            rows = row_count(part.rows, options) + _position_rows(part, options)
            work.append(ElementWork(module=part.name, op="quantizer", elements=rows * part.d_in))
        elif isinstance(part, Attention) and PROBABILITIES in _learned_sites(part.values, quantizing, own):
            elements = part.heads * _pairs(part, options)
            work.append(ElementWork(module=part.values, op="quantizer", elements=elements))
    if beside is not None:
        work += sublayer_elements(shape, beside, *_stack_rows(options))
    return [entry for entry in work if entry.elements]


def _resolved(
    shape: ModelShape, options: CountOptions, spec: MethodSpec | None
) -> tuple[CountOptions, MethodSpec | None, frozenset[str]]:
    """Lengths with virtual tokens; the method if it runs beside the weights, else None; the layers it adapts."""
    check_lengths(shape, options, extra_keys(spec) + extra_tokens(spec) if spec is not None else 0)
    if spec is None or (options.adapters == "merged" and can_merge(spec.method)):
        return options, None, frozenset()
    return _with_virtual_tokens(options, spec), spec, frozenset(linear.name for linear in targeted(shape, spec))


def row_count(rows: Rows, options: CountOptions) -> int:
    """How many rows a part works on, over the whole batch."""
    tokens = sum(options.lengths) if options.lengths else options.batch * options.query_len
    if rows is Rows.TOKENS:
        return tokens
    if rows is Rows.SOURCE:
        return 0 if options.cached else options.batch * (options.source_len or 0)
    if rows is Rows.SEQUENCES:
        return options.batch
    if rows is Rows.POSITIONS:
        return 0
    return {"out": 0, "last": options.batch, "all": tokens}[options.head]


def convolution_macs(convolution: Convolution, batch: int, positions: int) -> int:
    """MACs of a convolution: batch x C_out x output positions x C_in/groups x kernel volume.

    Transposed: batch x C_in x input positions x C_out/groups x kernel volume.
    """
    return sum(product.macs for product in _convolution(convolution, batch, positions))


def check_lengths(shape: ModelShape, options: CountOptions, virtual: int = 0) -> None:
    """Raise ModelError if the lengths do not suit the model, naming the length and what it allows.

    `virtual` tokens of a prompt or prefix stand before the others and take positions too.
    """
    longest = max(options.key_len, options.source_len or 0)
    if shape.max_length is not None and longest + virtual > shape.max_length:
        added = f" and {virtual} virtual tokens" if virtual else ""
        raise ModelError(
            f"sequence length {longest}{added}: {shape.name} has {shape.max_length} positions, so at most those"
        )
    if shape.two_stacks and options.source_len is None:
        raise ModelError(f"{shape.name} has an encoder and a decoder: source_len, the encoder's tokens, is missing")
    if not shape.two_stacks and options.source_len is not None:
        raise ModelError(f"source_len {options.source_len}: {shape.name} has one stack; give query_len and key_len")
    if options.cached and not shape.decoder:
        raise ModelError(
            f"key_len {options.key_len} is larger than query_len {options.query_len}: {shape.name} is an encoder, "
            "which has no cache"
        )
    if options.lengths is not None and shape.two_stacks:
        raise ModelError(f"lengths: {shape.name} has two stacks; real lengths are counted for one stack only")


def _with_virtual_tokens(options: CountOptions, spec: MethodSpec) -> CountOptions:
    """Prompt tuning puts tokens before the others, in both stacks if there are two, unless they are cached."""
    added = extra_tokens(spec)
    if not added:
        return options
    computed = 0 if options.cached else added
    longer: dict[str, object] = {"query_len": options.query_len + computed, "key_len": options.key_len + added}
    if options.source_len is not None:
        longer["source_len"] = options.source_len + added
    if options.lengths is not None:
        longer["lengths"] = [length + added for length in options.lengths]
    return options.model_copy(update=longer)


def _stack_rows(options: CountOptions) -> tuple[int, int]:
    return row_count(Rows.TOKENS, options), row_count(Rows.SOURCE, options)


def _linear_products(linear: Linear, options: CountOptions) -> Iterator[Product]:
    positions = _position_rows(linear, options)
    if positions:
        yield _weight_product(linear, linear.position_op, positions, "rel", constant=True)
    rows = row_count(linear.rows, options)
    if rows:
        yield _weight_product(linear, linear.op, rows, "x", constant=False)


def _position_rows(part: Linear | Norm, options: CountOptions) -> int:
    """Rows of relative positions that this call works on: all of the table once per batch, or none if it was kept."""
    return part.position_rows if options.positions == "recomputed" else 0


def _weight_product(linear: Linear, op: str, rows: int, left: str, *, constant: bool) -> Product:
    return Product(
        module=linear.name,
        op=op,
        batch=1,
        m=rows,
        k=linear.d_in,
        n=linear.d_out,
        left=left,
        right="W0",
        kind="weight",
        constant=constant,
    )


def _products_beside(linear: Linear, spec: MethodSpec, options: CountOptions) -> list[Product]:
    """The products of an adapter, which runs wherever its layer runs."""
    found = []
    positions = _position_rows(linear, options)
    if positions:
        found += adapter_products(linear, spec, positions, constant=True)
    rows = row_count(linear.rows, options)
    if rows:
        found += adapter_products(linear, spec, rows)
    return found


def _convolution_products(convolution: Convolution, options: CountOptions) -> list[Product]:
    if convolution.positions:
        return _convolution(convolution, options.batch, convolution.positions)
    if options.lengths:
        return [
            product
            for length, count in Counter(options.lengths).items()
            for product in _convolution(convolution, count, length)
        ]
    return _convolution(convolution, options.batch, options.query_len)


def _convolution(convolution: Convolution, batch: int, positions: int) -> list[Product]:
    groups = convolution.groups
    volume = prod(convolution.kernel)
    # One product per group: a transposed one reads each input position once and spreads it over the kernel.
    k, n = convolution.c_in // groups, convolution.c_out // groups
    k, n = (k, n * volume) if convolution.transposed else (k * volume, n)
    return [
        Product(
            module=convolution.name,
            op="conv",
            batch=batch * groups,
            m=positions,
            k=k,
            n=n,
            left="x",
            right="W0",
            kind="weight",
        )
    ]


def _spans(attention: Attention, options: CountOptions, added_keys: int) -> list[Span]:
    # A prefix lies in a decoder's cache of its own keys, so nothing is added to those of an encoder beside it.
    source = options.source_len or 0
    if attention.rows is Rows.SOURCE:
        return [] if options.cached else [(options.batch, source, source)]
    if attention.over is Rows.SOURCE:
        return [(options.batch, options.query_len, source)]
    if options.lengths:
        return [(count, length, length + added_keys) for length, count in sorted(Counter(options.lengths).items())]
    return [(options.batch, options.query_len, options.key_len + added_keys)]


def _attention_products(attention: Attention, options: CountOptions, added_keys: int) -> Iterator[Product]:
    for sequences, queries, keys in _spans(attention, options, added_keys):
        batch = sequences * attention.heads
        seen = _seen(attention, queries, keys)
        width = attention.head_dim
        if attention.causal and options.causal == "triangular":
            pairs = visible_pairs(queries, keys, attention.window)
            yield _act_product(attention, "scores", (batch, 1, width, pairs), ("q", "k"))
            yield _act_product(attention, "context", (batch, 1, pairs, width), ("p", "v"))
            continue
        yield _act_product(attention, "scores", (batch, queries, width, seen), ("q", "k"))
        if attention.c2p:
            yield _act_product(attention, "c2p", (batch, queries, width, attention.position_rows), ("q", "pos_k"))
        if attention.p2c:
            yield _act_product(attention, "p2c", (batch, keys, width, attention.position_rows), ("k", "pos_q"))
        yield _act_product(attention, "context", (batch, queries, seen, width), ("p", "v"))


def _seen(attention: Attention, queries: int, keys: int) -> int:
    """Keys that eager code multiplies with: a window shortens the cache and never what is computed at once."""
    if attention.window is None:
        return keys
    return min(keys - queries, attention.window - 1) + queries


def visible_pairs(queries: int, keys: int, window: int | None = None) -> int:
    """Pairs of a query and a key that a causal mask leaves, for queries that are the last of the keys.

    Without a window T(T+1)/2 + T x cache, where the cache holds keys - queries.
    """
    cached = keys - queries
    if window is None or window >= keys:
        return queries * (queries + 1) // 2 + queries * cached
    return sum(min(cached + position, window) for position in range(1, queries + 1))


def _act_product(attention: Attention, op: str, sizes: tuple[int, int, int, int], operands: tuple[str, str]) -> Product:
    batch, m, k, n = sizes
    return Product(
        module=attention.name, op=op, batch=batch, m=m, k=k, n=n, left=operands[0], right=operands[1], kind="act"
    )


def _part_elements(part: object, hidden: int, options: CountOptions) -> Iterator[ElementWork]:
    if isinstance(part, Linear) and part.bias:
        rows = row_count(part.rows, options) + _position_rows(part, options)
        yield ElementWork(module=part.name, op="bias", elements=rows * part.d_out)
    elif isinstance(part, Norm):
        rows = row_count(part.rows, options) + _position_rows(part, options)
        yield ElementWork(module=part.name, op="norm", elements=rows * part.width)
    elif isinstance(part, Activation):
        rows = row_count(part.rows, options)
        steps = 2 if part.gated else 1  # the function itself, and the product with the other projection
        yield ElementWork(module=part.name, op="activation", elements=steps * rows * part.width)
        if part.rows in {Rows.TOKENS, Rows.SOURCE}:
            yield ElementWork(module=part.name, op="residual", elements=rows * hidden)
    elif isinstance(part, Attention):
        yield from _attention_elements(part, hidden, options)


def _attention_elements(attention: Attention, hidden: int, options: CountOptions) -> Iterator[ElementWork]:
    pairs = _pairs(attention, options)
    rows = row_count(attention.rows, options)
    for op in ("scale", "softmax"):
        yield ElementWork(module=attention.name, op=op, elements=attention.heads * pairs)
    if attention.rotary:
        width = (attention.heads + attention.key_heads) * attention.head_dim
        yield ElementWork(module=attention.name, op="rotary", elements=rows * width)
    comparisons = attention.c2p + attention.p2c
    yield ElementWork(module=attention.name, op="gather", elements=comparisons * attention.heads * pairs)
    yield ElementWork(module=attention.name, op="residual", elements=rows * hidden)


def _pairs(attention: Attention, options: CountOptions) -> int:
    """Pairs of a query and a key that one head compares, over the whole batch."""
    spans = _spans(attention, options, 0)
    return sum(sequences * queries * _seen(attention, queries, keys) for sequences, queries, keys in spans)


def _learned_sites(name: str, spec: MethodSpec | None, own: Mapping[str, Owned]) -> Collection[str]:
    """The sites of a layer that have a quantizer, or a learned width where widths are given."""
    return spec.widths.get(name, own[name].quantizers) if spec is not None and name in own else ()


def _quantizer_elements(linear: Linear, spec: MethodSpec, own: Owned, rows: int) -> list[ElementWork]:
    """Rounding of activations, a shared one once; weights are rounded once and not in each pass."""
    rank = spec.ranks.get(linear.name, spec.rank)
    sizes = {"input": linear.d_in, "down_output": rank, "diagonal_output": rank, "output": linear.d_out}
    # Probabilities are no rows of the layer: they are listed with their attention.
    written = sum(sizes.get(site, 0) for site in kept_activations(linear, own, spec))
    return [ElementWork(module=linear.name, op="quantizer", elements=rows * written)]
