"""The gates of one adapter on one layer: their logits as state, their values as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankbits.gates import chain, hard_concrete
from rankbits.quant.float32_state import Float32State
from rankbits.quant.grid import GATED_WIDTHS
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


class LayerGates(Float32State):
    """Logits of the width gates of all quantizers of a layer, and of the gates of all ranks but the first.

    Args:
        sites: number of quantizers; 0 if bits are not learned.
        rank: maximum rank of at least 2, or None if the rank is not learned.
        rank_gate: how rank gates get their values.
        initial_bit_logit: start of all width gates.
        initial_rank_logit: start of all rank gates.
    """

    def __init__(
        self, sites: int, rank: int | None, rank_gate: RankGate, *, initial_bit_logit: float, initial_rank_logit: float
    ) -> None:
        super().__init__()
        self.rank_gate = rank_gate
        widths = (sites, len(GATED_WIDTHS))
        self.bit_logits = nn.Parameter(torch.full(widths, initial_bit_logit)) if sites else None
        self.rank_logits = nn.Parameter(torch.full((rank - 1,), initial_rank_logit)) if rank is not None else None

    def values(self, *, hard: bool) -> GateValues:
        """Gate values of one pass; noise, where there is any, is drawn from the default generator."""
        if self.bit_logits is None:
            widths = torch.empty(0, len(GATED_WIDTHS))
        elif hard:
            widths = chain.hard(hard_concrete.is_open(self.bit_logits))
        else:
            noise = hard_concrete.draw_noise(tuple(self.bit_logits.shape), device=self.bit_logits.device)
            widths = hard_concrete.sample(self.bit_logits, noise)
        return GateValues(widths, self._ranks(hard=hard), hard)

    def _ranks(self, *, hard: bool) -> Tensor | None:
        if self.rank_logits is None:
            return None
        logits = self.rank_logits
        if self.rank_gate is RankGate.STRAIGHT_THROUGH:
            gates = chain.round_straight_through(chain.cumulative(torch.sigmoid(logits)))
        elif hard:
            gates = chain.hard(hard_concrete.is_open(logits)).to(logits.dtype)
        else:
            noise = hard_concrete.draw_noise(tuple(logits.shape), device=logits.device)
            gates = chain.cumulative(hard_concrete.sample(logits, noise))
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
