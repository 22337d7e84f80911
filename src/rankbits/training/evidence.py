"""Choosing widths by what closing each gate was measured to cost: the posterior of the gates by Laplace's method.

For a gate whose prior charges a price for being open, the logit of its posterior is the evidence for it less that
price. The evidence is what the loss would lose without it, to second order at the weights that training has reached,
with the empirical Fisher information in place of the Hessian: half the mean square of the gradient by the gate's value,
times the number of examples. It is measured at open gates, without the noise of sampling all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankbits.gates.hard_concrete import OPEN_LOGIT
from rankbits.training.cost_terms import Cost, delivered
from rankbits.training.enforcement import enforce
from rankbits.training.gate_table import GateLogits

LEAST, MOST = 0.5, 6.0
"""Distance of logits from the threshold, between a gate that was hardly worth its price and one that was by far."""
TRUST = 0.75
"""Share of a gate's distance from its like, in logarithms, that is believed."""


def decide(logits: GateLogits, evidence: Tensor, costs: Sequence[Cost], limits: Sequence[float]) -> GateLogits:
    """Logits that meet the limits and keep the gates that are worth most for what they cost.

    Gates close in the order of their evidence by what they save; the ratio at which the limits are met is the price.
    A gate is as far from its threshold as the logarithm of its own ratio is from that of the price.

    Args:
        logits: as they are; ranks close only where widths alone cannot meet the limits.
        evidence: [quantizers, 4], of any scale.
        costs: what is limited.
        limits: of each cost; reachable.

    Returns:
        Logits of the same shapes.
    """
    kept = enforce(logits, costs, limits, evidence)
    ratios = _worth(evidence, kept, costs, limits)
    is_open = torch.arange(evidence.shape[1]) < kept.open_widths()[:, None]
    closed = ratios[~is_open & ratios.isfinite()]
    if not len(closed):
        return kept
    price = closed.clamp(min=torch.finfo(closed.dtype).tiny).max()
    distance = (ratios / price).clamp(min=torch.finfo(ratios.dtype).tiny).log()
    above, below = distance.clamp(LEAST, MOST), distance.clamp(-MOST, -LEAST)
    widths = OPEN_LOGIT + torch.where(is_open, above, below)
    pressed = ratios.isfinite().any(dim=1, keepdim=True)
    return GateLogits(torch.where(pressed, widths.float(), kept.widths), kept.ranks, kept.straight)


def shrunk(evidence: Tensor, sites: Tensor) -> Tensor:
    """Evidence drawn towards the geometric mean of the same gate at the same site of all layers.

    What was measured is the true cost of closing a gate up to a factor, and the gates that look cheapest or dearest of
    many are those of the largest error. Under normal errors of the logarithm the mean of the posterior keeps a fixed
    share of each distance from the common mean (empirical Bayes; James & Stein 1961): without it, a budget that one
    width for all would just meet is paid for with a few layers at two bits.

    Args:
        evidence: [quantizers, 4].
        sites: [quantizers] int64, which kind of tensor each quantizer rounds.

    Returns:
        [quantizers, 4] float64; zero where nothing was measured.
    """
    values = evidence.double()
    measured = values > 0.0
    logs = torch.where(measured, values, 1.0).log()
    result = torch.zeros_like(values)
    for site in sites.unique():
        rows = (sites == site)[:, None] & measured  # [quantizers, 4]
        mean = torch.where(rows, logs, 0.0).sum(dim=0) / rows.sum(dim=0).clamp(min=1)  # [4]
        result = torch.where(rows, (mean + TRUST * (logs - mean)).exp(), result)
    return result


def _worth(evidence: Tensor, kept: GateLogits, costs: Sequence[Cost], limits: Sequence[float]) -> Tensor:
    """[quantizers, 4] evidence of each gate for its share of the limits; infinite where it costs nothing."""
    # At two bits nothing could be halved: every chain is priced with one gate more than it keeps.
    more = delivered((kept.open_widths() + 1).clamp(max=evidence.shape[1]), kept.open_ranks())
    per_bit = torch.zeros(len(evidence), dtype=torch.float64)
    for cost, limit in zip(costs, limits, strict=True):
        saved = cost.width_savings(more).clamp(min=0.0)
        per_bit += saved / (more.widths[: len(evidence)] / 2.0) / limit
    bits = torch.tensor([2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    return torch.where(per_bit[:, None] > 0.0, evidence.double() / (per_bit[:, None] * bits), torch.inf)
