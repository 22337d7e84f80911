"""Linear products whose backward does only the work that learning asks for.

The gradient of a quantized weight serves its width gates and its range alone, each a single number, so a few rows of
the batch estimate it well enough: S of T rows, drawn uniformly without replacement and scaled by T / S, give an
unbiased estimate at S / T of the cost (after Drineas, Kannan & Mahoney 2006, who draw with replacement). Where a
low-rank update is part of the weight, its factors do not wait for that estimate: their gradients are those of LoRA
(Hu et al. 2022), token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LowRankUpdate:
    """The factors of s B diag(E g) A, a part of a merged weight.

    Args:
        down: A, [r, in_features].
        diagonal: E g, [r].
        up: B, [out_features, r].
        scale: s, a factor without unit.
    """

    down: Tensor
    diagonal: Tensor
    up: Tensor
    scale: float


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, rows: int | None) -> Tensor:
    """`F.linear`, with a gradient of the weight from a random subset of the rows of x.

    With fewer rows than the batch has, they are drawn from the default generator of the device in every forward pass,
    needed or not, so that recomputation under activation checkpointing repeats all that was drawn after them; pass None
    where the gradient of the weight is not wanted. Of x no more is kept than these rows. The gradients of x and bias
    are exact.

    Args:
        x: [..., in_features]; all but the last dimension together are the T rows.
        weight: [out_features, in_features].
        bias: [out_features], or None.
        rows: S >= 1, how many rows give the gradient of `weight`; None, or T and more: all of them.

    Returns:
        [..., out_features], in the dtype that `F.linear` would give, autocast included.

    Raises:
        ValueError: `rows` is below 1.
    """
    result: Tensor = _Product.apply(rows, *_autocast(x, weight, bias))  # type: ignore[no-untyped-call]
    return result


def merged_linear(x: Tensor, weight: Tensor, bias: Tensor | None, update: LowRankUpdate, *, rows: int | None) -> Tensor:
    """`F.linear` by a weight Q(W0 + s B diag(E g) A) whose update is trained as in LoRA.

    The weight must have been made from detached factors: its gradient, from `rows` rows as in `linear`, reaches gates
    and range alone. With g the gradient of an output row, u = B^T g and h = A x, sums over all rows give
    dA = s diag(E g) sum(u x^T), dB = s sum(g h^T) diag(E g) and d(E g)_i = s A_i sum(u x^T)_i. Where rounding clips
    no element these are the gradients through the rounded sum, straight-through.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features], the rounded sum.
        bias: [out_features], or None.
        update: the factors.
        rows: as in `linear`.

    Returns:
        [..., out_features]: no product is added to the forward pass.

    Raises:
        ValueError: `rows` is below 1.
    """
    scaled = update.diagonal * update.scale
    inputs = _autocast(x, weight, bias, update.down, scaled, update.up)
    result: Tensor = _Product.apply(rows, *inputs)  # type: ignore[no-untyped-call]
    return result


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The casts that autocast makes before a product; a `torch.autograd.Function` has to make them itself."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _choose(count: int, rows: int | None, device: torch.device) -> Tensor | None:
    """Indices of the rows that are used, [rows], or None for all."""
    if rows is not None and rows < 1:
        raise ValueError(f"`rows`={rows}: the gradient of a weight needs at least one row; None takes all")
    return None if rows is None or rows >= count else torch.randperm(count, device=device)[:rows]


class _Product(torch.autograd.Function):
    """x weight^T + bias; `factors` is empty or (A, s E g, B)."""

    @staticmethod
    def forward(ctx: Any, rows: int | None, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        _, for_x, for_weight, _, *for_factors = ctx.needs_input_grad
        flat = x.reshape(-1, x.shape[-1])  # [T, in_features]
        chosen = _choose(len(flat), rows, x.device)
        kept = None
        if any(for_factors) or (for_weight and chosen is None):
            kept = x
        elif for_weight and chosen is not None:
            kept = flat[chosen]  # [S, in_features]
        ctx.in_full = kept is x
        ctx.save_for_backward(weight if for_x else None, kept, chosen, *factors)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept, chosen, *factors = ctx.saved_tensors
        _, for_x, for_weight, for_bias, *for_factors = ctx.needs_input_grad
        g = grads[0].reshape(-1, grads[0].shape[-1])  # [T, out_features]
        flat: Any = None if kept is None else kept.reshape(-1, kept.shape[-1])
        # The types were settled in the forward pass, and the loss may be differentiated inside another autocast.
        with torch.autocast(g.device.type, enabled=False):
            grad_x = grads[0] @ weight if for_x else None
            grad_weight = _weight_gradient(g, flat, chosen, in_full=ctx.in_full) if for_weight else None
            grad_bias = g.sum(dim=0) if for_bias else None
            of_factors = _factor_gradients(g, flat, *factors) if any(for_factors) else (None,) * len(factors)
        return None, grad_x, grad_weight, grad_bias, *of_factors


def _weight_gradient(g: Tensor, x: Tensor, chosen: Tensor | None, *, in_full: bool) -> Tensor:
    """(T / S) sum of g x^T over the chosen rows: [out_features, in_features]."""
    if chosen is None:
        return g.T @ x
    some = g[chosen] * (len(g) / len(chosen))  # [S, out_features]
    return some.T @ (x[chosen] if in_full else x)


def _factor_gradients(
    g: Tensor, x: Tensor, down: Tensor, diagonal: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A [r, in_features], s E g [r] and B [out_features, r], from all rows."""
    outer = (g @ up).T @ x  # [r, in_features]
    hidden = x @ down.T  # [T, r]
    return diagonal[:, None] * outer, (outer * down).sum(dim=1), g.T @ (hidden * diagonal)
