"""The gates of one adapter on one layer: their logits as state, their values as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankbits.gates import chain, hard_concrete
from rankbits.quant.float32_state import Float32State
from rankbits.quant.grid import GATED_WIDTHS
from rankbits.quant.quantizer import Quantizer
from rankbits.tuners.bayesian_lora.config import RankGate


@dataclass(frozen=True)
class GateValues:
    """What the gates of one layer are in one pass.

    Args:
        widths: [sites, 4]: sampled values, or chained bool for `hard`.
        ranks: [r] in [0, 1], the first always 1; None keeps all ranks.
        hard: whether the gates are those of inference.
    """

    widths: Tensor
    ranks: Tensor | None
    hard: bool


def _widths(logits: Tensor, *, hard: bool, share: float) -> Tensor:
    """Values of width gates, of the shape of their logits: chained bool, or a `share` of the chains sampled."""
    standing = chain.hard(hard_concrete.is_open(logits))
    if hard:
        return standing
    sampled = hard_concrete.sample(logits, hard_concrete.draw_noise(tuple(logits.shape), device=logits.device))
    if share >= 1.0:
        return sampled
    chosen = torch.rand((*logits.shape[:-1], 1), device=logits.device) < share
    # As many times more gradient as it comes less often: its mean keeps its proportion to the penalty.
    value = sampled.detach()
    return torch.where(chosen, value + (sampled - value) / share, standing.to(logits.dtype))


class LayerGates(Float32State):
    """Logits of the width gates of all quantizers of a layer, and of the gates of all ranks but the first.

    While it `stands`, gates are those of inference and nothing is sampled. While it `measures` besides, the squared
    gradients of the loss by the gates are summed up in `evidence` [sites, 4] and `rank_evidence` [r - 1]. Times half
    the number of examples in a batch their mean is, to second order with the empirical Fisher information in place of
    the Hessian, what closing a gate costs in the loss; a rank's, once those behind it in the chain are closed.

    Args:
        sites: number of quantizers; 0 if bits are not learned.
        rank: maximum rank of at least 2, or None if the rank is not learned.
        rank_gate: how rank gates get their values.
        initial_bit_logit: start of all width gates.
        initial_rank_logit: start of all rank gates.
        sampled_share: share of the quantizers, drawn anew in each pass, whose width gates are sampled; the others stand
            as at inference.
    """

    evidence: Tensor
    rank_evidence: Tensor

    def __init__(
        self,
        sites: int,
        rank: int | None,
        rank_gate: RankGate,
        *,
        initial_bit_logit: float,
        initial_rank_logit: float,
        sampled_share: float = 1.0,
    ) -> None:
        super().__init__()
        self.rank_gate = rank_gate
        self.sampled_share = sampled_share
        self.stands = self.measures = False
        self.rounds = True
        """Whether there is anything to round: not while all gates stand open and are not measured."""
        widths = (sites, len(GATED_WIDTHS))
        self.bit_logits = nn.Parameter(torch.full(widths, initial_bit_logit)) if sites else None
        self.rank_logits = nn.Parameter(torch.full((rank - 1,), initial_rank_logit)) if rank is not None else None
        # Part of learning and not of the adapter: the schedule keeps it in its own state.
        self.register_buffer("evidence", torch.zeros(widths), persistent=False)
        self.register_buffer("rank_evidence", torch.zeros(0 if rank is None else rank - 1), persistent=False)

    def stand(self, *, stands: bool, measures: bool) -> None:
        """Enter a phase of training."""
        if (stands, measures) != (self.stands, self.measures):
            self.stands, self.measures = stands, measures
            self._look_at_gates()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._look_at_gates()

    def _look_at_gates(self) -> None:
        """Read from the device once in a phase: in a pass it would be a wait, and end a graph of torch.compile."""
        self.rounds = not self.stands or self.measures
        if not self.rounds and self.bit_logits is not None:
            self.rounds = not bool(hard_concrete.is_open(self.bit_logits).all())

    def put_on_grid(self, quantizer: Quantizer, x: Tensor, widths: Tensor, *, hard: bool) -> Tensor:
        """Round a tensor by width gates of this layer, and by ranges that cover it while gates stand.

        What is measured is the cost of closing gates, so nothing may be clipped while the model still moves. Before
        that, rounding to 32 bits would take time and change nothing within a range: where gates stand open, it is left
        out.

        Args:
            quantizer: of the tensor.
            x: any shape.
            widths: [4], as `values` gives them for a quantizer.
            hard: whether they are those of inference.
        """
        stands = self.stands and not hard
        result: Tensor = quantizer(x, widths, hard=hard, cover=stands, rounds=not stands or self.rounds)
        return result

    def values(self, *, hard: bool) -> GateValues:
        """Gate values of one pass; noise, where there is any, is drawn from the default generator."""
        if self.bit_logits is None:
            widths = torch.empty(0, len(GATED_WIDTHS))
        elif self.stands and not hard:
            widths = self._standing(slice(None))
        else:
            widths = _widths(self.bit_logits, hard=hard, share=self.sampled_share)
        return GateValues(widths, self._ranks(hard=hard), hard)

    def widths_of(self, row: int, *, hard: bool) -> Tensor:
        """[4] values of the width gates of one quantizer, with noise of their own: for layers that share them."""
        if self.bit_logits is None:
            raise IndexError(f"no width gates, so no row {row}")
        if self.stands and not hard:
            return self._standing(row)
        return _widths(self.bit_logits[row], hard=hard, share=self.sampled_share)

    def _standing(self, rows: slice | int) -> Tensor:
        """The width gates of inference, as numbers, which are measured if it is time."""
        assert self.bit_logits is not None
        standing = chain.hard(hard_concrete.is_open(self.bit_logits.detach()[rows])).to(torch.float32)
        return self._noted(standing, self.evidence[rows]) if self.measures else standing

    @staticmethod
    def _noted(values: Tensor, evidence: Tensor) -> Tensor:
        """A leaf of these values whose squared gradient is added to `evidence` in the backward pass."""
        leaf = values.detach().requires_grad_(torch.is_grad_enabled())
        if leaf.requires_grad:
            leaf.register_hook(lambda gradient: _add_square(evidence, gradient))
        return leaf

    def without_row(self, row: int) -> None:
        """Drop the width gates of one quantizer, which another layer decides about; before training alone."""
        if self.bit_logits is None:
            raise IndexError(f"no width gates, so no row {row}")
        rest = torch.cat([self.bit_logits[:row], self.bit_logits[row + 1 :]]).detach()
        self.bit_logits = nn.Parameter(rest, requires_grad=self.bit_logits.requires_grad) if len(rest) else None
        self.evidence = torch.cat([self.evidence[:row], self.evidence[row + 1 :]])

    def _ranks(self, *, hard: bool) -> Tensor | None:
        if self.rank_logits is None:
            return None
        logits = self.rank_logits
        if self.rank_gate is RankGate.STRAIGHT_THROUGH:
            gates = chain.round_straight_through(chain.cumulative(torch.sigmoid(logits)))
        elif hard or self.stands:
            gates = chain.hard(hard_concrete.is_open(logits)).to(logits.dtype)
        else:
            noise = hard_concrete.draw_noise(tuple(logits.shape), device=logits.device)
            gates = chain.cumulative(hard_concrete.sample(logits, noise))
        if self.measures and not hard:
            gates = self._noted(gates, self.rank_evidence)
        return torch.cat([torch.ones_like(gates[:1]), gates])

    def width_probabilities(self) -> Tensor | None:
        """[sites, 4] probability that each quantizer uses at least 4, 8, 16 and 32 bits; None without quantizers."""
        if self.bit_logits is None:
            return None
        return chain.cumulative(hard_concrete.open_probability(self.bit_logits))

    def rank_probabilities(self) -> Tensor | None:
        """[r - 1] probability that ranks 2 to r are used; None if the rank is not learned.

        For straight-through gates, the product that is rounded (Alg. 1); for hard concrete ones, the probability that
        the sampled product is not zero.
        """
        if self.rank_logits is None:
            return None
        if self.rank_gate is RankGate.STRAIGHT_THROUGH:
            return chain.cumulative(torch.sigmoid(self.rank_logits))
        return chain.cumulative(hard_concrete.open_probability(self.rank_logits))

    @torch.no_grad()
    def clamp(self, low: float, high: float) -> None:
        """Keep all logits in [low, high], so that a closed gate is still sampled open now and then and can return."""
        for logits in (self.bit_logits, self.rank_logits):
            if logits is not None:
                logits.clamp_(low, high)


@torch.no_grad()
def _add_square(evidence: Tensor, gradient: Tensor) -> None:
    # A loss that overflowed in one pass says nothing about gates; without this it would say all there is to say.
    evidence += torch.nan_to_num(gradient.square(), nan=0.0, posinf=0.0)
