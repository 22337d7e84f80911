"""Watching one forward pass below autograd: every matrix product becomes a record, all other writing is summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from rankbits.accounting.measure.kernels import (
    MatrixProduct,
    bound,
    is_opaque,
    is_product,
    matrix_products,
    read_by,
    short_name,
    written_in_place,
)
from rankbits.accounting.measure.places import Call, Place, Places, base_name
from rankbits.accounting.measure.provenance import (
    SOFTMAX,
    WIDEST,
    Mark,
    Provenance,
    dtype_bits,
    shares_memory,
    tensors_in,
)
from rankbits.accounting.measure.work import WorkSums, Written
from rankbits.errors import ModelError
from rankbits.records import Product
from rankbits.records.costs import Width

CLASSIFIERS = frozenset({"classifier", "score", "lm_head"})
"""Last names of layers whose product is called head, besides the output embedding that a model declares."""
_NO_WORK = ("empty", "new_empty", "sym_", "size", "stride", "storage_offset", "numel", "dim", "is_")
_ADAPTER_OPS = {"A": "lora_down", "B": "lora_up", "M": "mora", "D": "adapter_down", "U": "adapter_up"}
_NAMES = {
    ("lora_down", "identity"): "dora_down",
    ("lora_up", "A^T"): "dora_up",
    ("lora_down", "B"): "lora_merge",
}
"""DoRA pushes an identity matrix through A and B at each call, for the norm of the weight they make; a quantizer of the
sum of weight and update needs the update as a matrix."""


class Recorder(TorchDispatchMode):
    """Records the products of all operations that run inside it.

    Args:
        places: which module runs.
        provenance: what is known of tensors.
        ranks: hard rank of a layer's adapter by (module, adapter), where more rows are multiplied than it keeps.
    """

    supports_higher_order_operators = True

    def __init__(self, places: Places, provenance: Provenance, ranks: Mapping[tuple[str, str], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paused = False
        self.heads: set[int] = set()
        self.cacheable: set[int] = set()
        self.work = WorkSums()
        self._products: list[Product] = []
        self._places = places
        self._provenance = provenance
        self._ranks = ranks

    def products(self) -> list[Product]:
        """All products in running order."""
        return list(self._products)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and note what it did."""
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            raise self._not_understood(str(func))
        name, given = short_name(func), bound(func, args, kwargs)
        if not self._places.inside_opaque:
            operands = [tensor for tensor in tensors_in(given) if tensor.is_floating_point()]
            if is_opaque(func, operands):
                raise self._not_understood(f"{func}")
            if not is_product(name) and _is_composite(func):
                with self:
                    return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        self._note(func, name, given, result)
        return result

    def finish_opaque(self) -> None:
        """Turn the calls that were counted as a whole into products."""
        while self._places.finished_opaque:
            call, x, output = self._places.finished_opaque.pop(0)
            if self.paused:
                continue
            k, n = x.shape[-1], output.shape[-1]
            if self._places.is_head(call):
                self.heads.add(len(self._products))
            self._products.append(self._opaque(call, x, (x.numel() // k, k, n)))

    def _note(self, func: OpOverload, name: str, given: dict[str, Any], result: Any) -> None:
        opaque = self._places.inside_opaque
        if opaque is not None:
            opaque.integer |= name == "_int_mm"
            return
        self.finish_opaque()
        results = list(tensors_in(result))
        found = matrix_products(name, given, result)
        if found:
            self._record(name, found, given, results[0])
            return
        operands = list(tensors_in(given))
        changed = written_in_place(func, given)
        written = changed or [tensor for tensor in results if not shares_memory(tensor, operands)]
        if name in SOFTMAX:
            self._name_scores(operands[0])
        # Padding with anything but zero puts a number beside the grid.
        known_as = "fill" if name == "constant_pad_nd" and given.get("value", 0) else name
        self._provenance.derive(known_as, read_by(func, given), written)
        if not name.startswith(_NO_WORK):
            tainted = self._provenance.is_tainted(written)
            self._add_work(name, sum(tensor.numel() for tensor in written), tainted=tainted)

    def _record(self, name: str, found: list[MatrixProduct], given: Mapping[str, Any], result: Tensor) -> None:
        operands = list(tensors_in(given))
        mark = Mark(tainted=self._provenance.is_tainted(operands))
        for matrices in found:
            mark = self._add(matrices, mark)
            if matrices.op == "scores":
                self._add_work("softmax", matrices.batch * matrices.m * matrices.n, tainted=mark.tainted)
                mark = Mark(tainted=mark.tainted)
        self._provenance.put(result, mark)
        if given.get("bias") is not None or (name.startswith(("add", "badd", "_addmm")) and given.get("beta", 1) != 0):
            self._add_work("bias", result.numel(), tainted=mark.tainted)

    def _add(self, matrices: MatrixProduct, mark: Mark) -> Mark:
        """Keep one product; what is known of its result."""
        left = self._known(matrices.left, like=matrices.right)
        right = self._known(matrices.right, like=matrices.left)
        if self._places.place(None).adapter is not None and left.weight is None and right.weight is None:
            # Inside an adapter whatever does not depend on the input is a weight, or made of weights.
            left, right = _as_weight(left, other=right), _as_weight(right)
        if left.weight is not None and right.weight is None:
            matrices = MatrixProduct(
                matrices.batch, matrices.n, matrices.k, matrices.m, matrices.right, matrices.left, matrices.op
            )
            left, right = right, left
        if matrices.batch * matrices.m * matrices.k * matrices.n == 0:
            return mark
        place = self._places.place(right.weight)
        if right.weight is not None:
            product = self._weight_product(matrices, left, right, place)
        else:
            product = _act_product(matrices, left, right, place)
        if self.paused:
            return _after(product, mark, None)
        index = len(self._products)
        self._products.append(product)
        if product.constant and not place.runs_anew:
            self.cacheable.add(index)
        if self._places.is_head():
            self.heads.add(index)
        return _after(product, mark, index)

    def _known(self, operand: Tensor | None, *, like: Tensor | None) -> Mark:
        """What is known of an operand; one that a fused kernel makes is held as `like`, its other operand."""
        if operand is None:
            return Mark("p", WIDEST if like is None else dtype_bits(like), tainted=True)
        mark = self._provenance.of(operand)
        return Mark(mark.name, min(mark.bits, dtype_bits(operand)), mark.tainted, mark.weight)

    def _weight_product(self, matrices: MatrixProduct, left: Mark, right: Mark, place: Place) -> Product:
        constant = not (left.tainted or right.tainted)
        op = self._op_on_weight(matrices, left, right, place)
        name = "rel" if constant and place.adapter is None else left.name
        k, n = self._at_hard_rank(matrices, op, place)
        return Product(
            module=place.module,
            op=op,
            batch=matrices.batch,
            m=matrices.m,
            k=k,
            n=n,
            left=name,
            right=right.name,
            bits_left=cast(Width, left.bits),
            bits_right=cast(Width, right.bits),
            kind="weight",
            constant=constant,
            adapter=place.adapter,
        )

    def _op_on_weight(self, matrices: MatrixProduct, left: Mark, right: Mark, place: Place) -> str:
        if place.adapter is not None:
            op = _ADAPTER_OPS.get(right.name, "adapter")
            return _NAMES.get((op, left.name), op)
        if matrices.op:
            return matrices.op
        if not left.tainted and not right.tainted:
            role = self._places.role_here()
            return {"q": "pos_query", "k": "pos_key"}.get(role or "", "linear")
        return "head" if self._places.is_head() or place.module.rpartition(".")[2] in CLASSIFIERS else "linear"

    def _at_hard_rank(self, matrices: MatrixProduct, op: str, place: Place) -> tuple[int, int]:
        rank = self._ranks.get((place.module, place.adapter or ""))
        if rank is None:
            return matrices.k, matrices.n
        if op in {"lora_down", "dora_down"}:
            return matrices.k, min(matrices.n, rank)
        return min(matrices.k, rank), matrices.n

    def _opaque(self, call: Call, x: Tensor, sizes: tuple[int, int, int]) -> Product:
        m, k, n = sizes
        known = self._provenance.of(x)
        left = min(known.bits, 8 if call.integer else dtype_bits(x))
        name = base_name(call.name)
        return Product(
            module=name,
            op="head" if name.rpartition(".")[2] in CLASSIFIERS else "linear",
            batch=1,
            m=m,
            k=k,
            n=n,
            left=known.name if known.name in {"x", "h"} else "x",
            right="W0",
            bits_left=cast(Width, left),
            bits_right=cast(Width, call.opaque_bits),
            kind="weight",
            constant=not call.tainted,
        )

    def _name_scores(self, operand: Tensor) -> None:
        for index in self._provenance.of(operand).scores:
            if self._products[index].op == "act":
                product = self._products[index]
                names = {
                    "left": product.left if product.left in {"q", "k"} else "q",
                    "right": product.right if product.right in {"q", "k"} else "k",
                }
                self._products[index] = product.model_copy(update={"op": "scores", **names})

    def _add_work(self, op: str, elements: int, *, tainted: bool) -> None:
        if not self.paused and elements:
            place = self._places.place(None)
            constant = not tainted and not place.runs_anew
            self.work.add(Written(place.module, op, self._places.is_head(), constant), elements)

    def _not_understood(self, operation: str) -> ModelError:
        return ModelError(
            f"{self._places.described()} runs {operation}, which may multiply matrices in a number that cannot be "
            "known; expected products that torch dispatches (mm, addmm, bmm, convolution, "
            "scaled_dot_product_attention ...)"
        )


def _as_weight(mark: Mark, other: Mark | None = None) -> Mark:
    if mark.tainted or (other is not None and not other.tainted):
        return mark
    return Mark("W", mark.bits, weight="")


def _is_composite(func: OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _after(product: Product, mark: Mark, index: int | None) -> Mark:
    """What is known of a product's result: the hidden rows of an adapter, or scores until a softmax reads them."""
    if product.op in {"lora_down", "dora_down"}:
        return Mark("h" if product.op == "lora_down" else "A^T", tainted=mark.tainted)
    scores = frozenset({index}) if index is not None and product.kind == "act" else frozenset[int]()
    return Mark(tainted=mark.tainted, scores=scores)


def _act_product(matrices: MatrixProduct, left: Mark, right: Mark, place: Place) -> Product:
    names = {left.name, right.name}
    op = matrices.op
    if not op:
        op = "context" if "p" in names else "c2p" if "pos_k" in names else "p2c" if "pos_q" in names else "act"
    shown = {"scores": ("q", "k"), "context": ("p", "v")}.get(op, (left.name, right.name))
    if op == "context" and right.name == "p":
        shown = ("v", "p")
    return Product(
        module=place.module,
        op=op,
        batch=matrices.batch,
        m=matrices.m,
        k=matrices.k,
        n=matrices.n,
        left=shown[0],
        right=shown[1],
        bits_left=cast(Width, left.bits),
        bits_right=cast(Width, right.bits),
        kind="act",
        constant=not (left.tainted or right.tainted),
        adapter=place.adapter,
    )
