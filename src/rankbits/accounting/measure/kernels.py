"""Which operations of torch are matrix products, and of what size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from rankbits.accounting.measure.provenance import tensors_in

PLAIN = {
    "mm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "_addmm_activation": ("mat1", "mat2"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "addbmm": ("batch1", "batch2"),
    "mv": ("self", "vec"),
    "addmv": ("mat", "vec"),
    "dot": ("self", "tensor"),
    "vdot": ("self", "other"),
    "_int_mm": ("self", "mat2"),
    "_scaled_mm": ("self", "mat2"),
    "_grouped_mm": ("self", "mat2"),
}
"""Operands [m, k] and [k, n], with a batch in front of one or both."""
TRANSPOSED = {
    "linear": ("input", "weight"),
    "_weight_int8pack_mm": ("self", "mat2"),
}
"""Operands [m, k] and [n, k]."""
ATTENTION = "_scaled_dot_product_"
OPAQUE = frozenset(
    {
        "_native_multi_head_attention",
        "_transformer_encoder_layer_fwd",
        "_triton_multi_head_attention",
        "_triton_scaled_dot_attention",
        "_flash_attention_forward",
        "_efficient_attention_forward",
        "mkldnn_rnn_layer",
        "_cudnn_rnn",
        "miopen_rnn",
        "quantized_lstm",
        "quantized_gru",
        "_scaled_grouped_mm",
        "_weight_int4pack_mm",
        "_weight_int4pack_mm_for_cpu",
        "_weight_int4pack_mm_with_scales_and_zeros",
        "_dyn_quant_matmul_4bit",
        "_mixed_dtypes_linear",
        "_wrapped_quantized_linear_prepacked",
        "_trilinear",
        "_cdist_forward",
        "_sparse_mm",
        "_sparse_sparse_matmul",
        "_cslt_sparse_mm",
        "sspaddmm",
        "hspmm",
        "cholesky_solve",
        "cholesky_inverse",
        "triangular_solve",
        "lu_solve",
        "ormqr",
    }
)
"""Operations that multiply matrices inside, in a number that their operands do not tell."""
OPAQUE_PREFIXES = ("linalg_", "_linalg_")
NOT_OPAQUE = frozenset({"linalg_vector_norm", "linalg_cross"})
OPEN_NAMESPACES = frozenset({"aten", "prims", "prim", "_c10d_functional", "c10d"})
"""Namespaces whose operations do what their names say; one of another namespace is a kernel we know nothing of."""


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """[batch, m, k] by [batch, k, n]; an operand is None where the kernel makes it itself (softmax).

    `op` is what only the kernel can tell: scores, context, conv; empty for a plain product.
    """

    batch: int
    m: int
    k: int
    n: int
    left: Tensor | None
    right: Tensor | None
    op: str = ""


def bound(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one call by the names of the operation's schema."""
    positional = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    return positional | dict(kwargs)


def read_by(func: OpOverload, given: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call reads: all but those it is only told to write to."""
    only_written = {a.name for a in func._schema.arguments if a.kwarg_only and a.alias_info is not None}
    return list(tensors_in({name: value for name, value in given.items() if name not in only_written}))


def written_in_place(func: OpOverload, given: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among its arguments that a call writes to."""
    changed: list[Tensor] = []
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += tensors_in(given.get(argument.name))
    return changed


def short_name(func: OpOverload) -> str:
    """Addmm for aten::addmm.default; in-place operations lose their underscore."""
    name = func._schema.name.partition("::")[2]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def is_opaque(func: OpOverload, operands: Sequence[Tensor]) -> bool:
    """Whether the operation may multiply matrices in a way that cannot be counted."""
    name = short_name(func)
    if func.namespace in OPEN_NAMESPACES:
        return name in OPAQUE or (name.startswith(OPAQUE_PREFIXES) and name not in NOT_OPAQUE)
    return any(operand.dim() >= 2 for operand in operands)


def is_product(name: str) -> bool:
    """Whether calls of this operation are matrix products."""
    return name in PLAIN or name in TRANSPOSED or name.startswith(ATTENTION) or name == "convolution"


def matrix_products(name: str, given: Mapping[str, Any], result: Any) -> list[MatrixProduct]:
    """The products that one call runs, none if it is no matrix product.

    Args:
        name: `short_name` of the operation.
        given: its arguments by name.
        result: what it returned.
    """
    if name in PLAIN:
        left, right = (given[key] for key in PLAIN[name])
        return [_product(left, right, right.shape)]
    if name in TRANSPOSED:
        left, right = (given[key] for key in TRANSPOSED[name])
        return [_product(left, right, right.shape[::-1])]
    if name.startswith(ATTENTION) and "query" in given:
        return _attention(given["query"], given["key"], given["value"])
    return [_convolution(given, result)] if name == "convolution" else []


def _product(left: Tensor, right: Tensor, right_shape: Sequence[int]) -> MatrixProduct:
    if left.dim() == 1:
        return MatrixProduct(1, 1, left.shape[0], 1, left, right)
    if len(right_shape) == 1:
        return MatrixProduct(1, left.shape[0], right_shape[0], 1, left, right)
    *leading, n = right_shape
    if left.dim() == 3 and len(leading) == 2:
        return MatrixProduct(left.shape[0], left.shape[1], left.shape[2], n, left, right)
    # Rows of all leading axes share one weight; in a grouped product each row meets one of several.
    return MatrixProduct(1, math.prod(left.shape[:-1]), left.shape[-1], n, left, right)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> list[MatrixProduct]:
    """Scores and context of [B, heads, T, c] queries; shared keys and values are used by every query head."""
    batch, heads, rows, width = query.shape
    columns = key.shape[-2]
    return [
        MatrixProduct(batch * heads, rows, width, columns, query, key, "scores"),
        MatrixProduct(batch * heads, rows, columns, value.shape[-1], None, value, "context"),
    ]


def _convolution(given: Mapping[str, Any], result: Tensor) -> MatrixProduct:
    """[B, C_in, positions] by [C_out, C_in / groups, kernel], or by [C_in, C_out / groups, kernel] if transposed."""
    x, weight, groups = given["input"], given["weight"], given["groups"]
    volume = math.prod(weight.shape[2:])
    if given["transposed"]:
        shape = (weight.shape[0] // groups, weight.shape[1] * volume)
        positions = math.prod(x.shape[2:])
    else:
        shape = (weight.shape[1] * volume, weight.shape[0] // groups)
        positions = math.prod(result.shape[2:])
    return MatrixProduct(x.shape[0] * groups, positions, *shape, x, weight, "conv")
