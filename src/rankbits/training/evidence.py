"""Choosing widths and ranks by what closing each gate was measured to cost: their posterior by Laplace's method.

For a gate whose prior charges a price for being open, the logit of its posterior is the evidence for it less that
price. The evidence is what the loss would lose without it, to second order at the weights that training has reached,
with the empirical Fisher information in place of the Hessian: half the mean square of the gradient by the gate's value,
times the number of examples. It is measured at open gates, without the noise of sampling all of them at once. All gates
are measured in one unit, so widths and ranks are traded for one another where both cost something.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankbits.gates.hard_concrete import OPEN_LOGIT
from rankbits.training.cost_terms import Amounts, Cost, delivered
from rankbits.training.enforcement import clear, enforce
from rankbits.training.gate_table import GateLogits, PerGate
from rankbits.training.open_gates import OpenGates

LEAST, MOST = 0.5, 6.0
"""Distance of logits from the threshold, between a gate that was hardly worth its price and one that was by far."""
TRUST = 0.75
"""Share of a gate's distance from its like, in logarithms, that is believed."""


def decide(logits: GateLogits, evidence: PerGate, costs: Sequence[Cost], limits: Sequence[float]) -> GateLogits:
    """Logits that meet the limits and keep the gates that are worth most for what they cost.

    Gates close in the order of their evidence by what they save; the ratio at which the limits are met is the price.
    A gate is as far from its threshold as the logarithm of its own ratio is from that of the price.

    Args:
        logits: as they are.
        evidence: of any scale; that of ranks as `nested` makes it.
        costs: what is limited.
        limits: of each cost; reachable.

    Returns:
        Logits of the same shapes. A gate that costs nothing stays as it was.
    """
    kept = enforce(logits, costs, limits, evidence)
    chosen = OpenGates(kept.open_widths(), kept.open_ranks(), evidence)
    ratios = _worth(chosen, costs, limits)
    is_open = chosen.is_open(), torch.arange(evidence.ranks.shape[1]) < chosen.ranks[:, None]
    closed = torch.cat([r[~o & r.isfinite()] for r, o in zip((ratios.widths, ratios.ranks), is_open, strict=True)])
    if not len(closed):
        return kept
    price = closed.clamp(min=torch.finfo(closed.dtype).tiny).max()
    widths = OPEN_LOGIT + _distance(ratios.widths, price, is_open[0])
    # The straight-through gate of a rank stands at one half on its own, where its logit is zero.
    threshold = torch.where(kept.straight, 0.0, OPEN_LOGIT)[:, None]
    ranks = threshold + _distance(ratios.ranks, price, is_open[1])
    decided = GateLogits(
        torch.where(ratios.widths.isfinite().any(dim=1, keepdim=True), widths.float(), kept.widths),
        torch.where(ratios.ranks.isfinite(), ranks.float(), kept.ranks),
        kept.straight,
    )
    return clear(decided, chosen)


def _distance(ratios: Tensor, price: Tensor, is_open: Tensor) -> Tensor:
    """How far from its threshold each gate is: above it if it is open, below it otherwise."""
    distance = (ratios / price).clamp(min=torch.finfo(ratios.dtype).tiny).log()
    return torch.where(is_open, distance.clamp(LEAST, MOST), distance.clamp(-MOST, -LEAST))


def posterior_evidence(measured: PerGate, sites: Tensor) -> PerGate:
    """What was measured, with its errors drawn together, and for ranks as a chain gives it up.

    Args:
        measured: what closing each gate was measured to cost, of any scale.
        sites: [quantizers] int64, which kind of tensor each quantizer rounds.

    Returns:
        float64, of the same scale.
    """
    ranks = shrunk(measured.ranks.clamp(min=0.0), torch.zeros(len(measured.ranks), dtype=torch.int64))
    return PerGate(shrunk(measured.widths, sites), nested(torch.where(measured.ranks < 0.0, -torch.inf, ranks)))


def nested(evidence: Tensor) -> Tensor:
    """Evidence of rank gates such that no gate is worth more than one before it in its chain.

    The components of an update come in no order, but close from the last on. Where one is worth more than those before
    it, it can only go together with them, and is worth their mean: least squares under the order (isotonic regression;
    Barlow et al. 1972), which keeps the sum of each such run.

    Args:
        evidence: [layers, r - 1], minus infinity where a layer has fewer.

    Returns:
        The same shape, non-increasing along each row.
    """
    # Not above: importing rankbits should not take the time that importing this does.
    from scipy.optimize import isotonic_regression

    result = evidence.clone()
    for row in result:
        inside = row.isfinite()
        if bool(inside.any()):
            ordered = isotonic_regression(row[inside].numpy(), increasing=False).x
            row[inside] = torch.from_numpy(ordered.copy()).to(row.dtype)
    return result


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


def _worth(chosen: OpenGates, costs: Sequence[Cost], limits: Sequence[float]) -> PerGate:
    """Evidence of each gate for its share of the limits; infinite where it costs nothing."""
    # At two bits nothing could be halved, nor a rank of one lessened: every chain is priced with one gate more.
    gates, evidence = chosen.wishes.widths.shape[1], chosen.wishes
    most = evidence.ranks.isfinite().sum(dim=1)
    more = delivered((chosen.widths + 1).clamp(max=gates), torch.minimum(chosen.ranks + 1, most))
    widths, ranks = _shares(more, costs, limits)
    per_bit = widths / (more.widths[:-1] / 2.0)
    bits = torch.tensor([2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    of_ranks = torch.where(
        evidence.ranks.isfinite() & (ranks > 0.0)[:, None], evidence.ranks / ranks[:, None], torch.inf
    )
    return PerGate(
        torch.where(per_bit[:, None] > 0.0, evidence.widths.double() / (per_bit[:, None] * bits), torch.inf), of_ranks
    )


def _shares(amounts: Amounts, costs: Sequence[Cost], limits: Sequence[float]) -> tuple[Tensor, Tensor]:
    """[quantizers] and [layers] shares of the limits that closing each top gate would save."""
    widths, ranks = torch.zeros_like(amounts.widths[:-1]), torch.zeros_like(amounts.ranks[:-1])
    for cost, limit in zip(costs, limits, strict=True):
        widths += cost.width_savings(amounts).clamp(min=0.0) / limit
        ranks += cost.rank_savings(amounts).clamp(min=0.0) / limit
    return widths, ranks
