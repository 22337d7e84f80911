"""Rounding a weight so that its output errors cancel: each column makes up for the errors of those before it.

What rounding costs a linear layer is not how far each number moves, but how far the outputs do: tr(D H D^T) for a
change D of the weight and the second moment H = sum x x^T of the inputs. Rounding one column after another, the columns
that are still to come can take up what the last one did to the outputs. With U the upper Cholesky factor of H^-1 the
best they can do about an error e of column i is to move by -e U[i, i:] / U[i, i] (Optimal Brain Compression, Frantar &
Alistarh 2022; GPTQ, Frantar et al. 2023, Alg. 1, from the most active column on).
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the mean diagonal of H that is added to its diagonal, so that it can be inverted (GPTQ, Sec. 3.3)."""
BLOCK = 128
"""Columns whose errors are passed on to later ones together."""
LARGEST_OFFSET = 127
"""Offsets are kept in eight bits."""

Limits = tuple[int, int]


def compensating_offsets(weight: Tensor, step: Tensor, limits: Limits, moment: Tensor) -> Tensor:
    """What to add to the nearest whole steps of a weight, before they are clamped, so that outputs move least.

    Args:
        weight: [out_features, in_features].
        step: step of the grid, broadcasts over `weight`.
        limits: smallest and largest code.
        moment: [in_features, in_features], sum of x x^T over inputs x of the layer.

    Returns:
        int8 [out_features, in_features]. Zeros where no row gains by them: a row whose outputs would move further than
        with nearest codes keeps these.
    """
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    values = weight.detach().to(dtype)
    steps = step.detach().to(dtype).expand_as(values)
    second = moment.to(weight.device, dtype)
    if not bool(torch.isfinite(second).all()) or float(second.diagonal().sum()) <= 0.0:
        return torch.zeros_like(weight, dtype=torch.int8)
    chosen = _compensated_codes(values, steps, limits, second)

    def codes_with(offsets: Tensor) -> Tensor:
        # As it will run, in the dtype of the weight, which may break a tie the other way.
        return _codes(weight.detach() + offsets * step, step, limits).to(dtype)

    nearest = codes_with(torch.zeros_like(weight))
    # Of numbers beyond the grid, too, the code that is chosen must be what comes out.
    offsets = torch.where(chosen == nearest, 0.0, chosen - torch.round(values / steps)).to(weight.dtype)
    offsets = offsets.clamp(-LARGEST_OFFSET, LARGEST_OFFSET)
    before, after = (codes * steps - values for codes in (nearest, codes_with(offsets)))
    gains = ((after @ second) * after).sum(dim=1) < ((before @ second) * before).sum(dim=1)  # [out_features]
    return torch.where(gains[:, None], offsets, 0.0).to(torch.int8)


def _codes(values: Tensor, steps: Tensor, limits: Limits) -> Tensor:
    return torch.clamp(torch.round(values / steps), *limits)


def _compensated_codes(values: Tensor, steps: Tensor, limits: Limits, second: Tensor) -> Tensor:
    """Codes of the shape of `values`, column by column from the most active one on."""
    order = torch.argsort(second.diagonal(), descending=True)
    factor = _inverse_factor(second[order][:, order])
    left, steps = values[:, order], steps[:, order]
    codes = torch.empty_like(left)
    count = left.shape[1]
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        errors = torch.empty_like(left[:, start:end])
        for i in range(start, end):
            codes[:, i] = _codes(left[:, i], steps[:, i], limits)
            errors[:, i - start] = (left[:, i] - codes[:, i] * steps[:, i]) / factor[i, i]
            left[:, i:end] -= errors[:, i - start, None] * factor[i, i:end]
        left[:, end:] -= errors @ factor[start:end, end:]
    return codes[:, torch.argsort(order)]


def _inverse_factor(second: Tensor) -> Tensor:
    """Upper triangular U with U^T U = (H + damping)^-1."""
    damping = DAMPING * second.diagonal().mean()
    damped = second + damping * torch.eye(len(second), dtype=second.dtype, device=second.device)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor
