"""All gates of a model as two small matrices on the host, and back: what a controller looks at once per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankbits.gates import chain, hard_concrete
from rankbits.training.processes import Reduction, agree
from rankbits.tuners.bayesian_lora import GatedLayer, learning_adapters
from rankbits.tuners.bayesian_lora.config import RankGate, Site
from rankbits.tuners.bayesian_lora.layer_gates import LayerGates

WIDTH_GATES = 4
"""Gates of one quantizer, for 4, 8, 16 and 32 bits."""


@dataclass(frozen=True)
class GateLogits:
    """Logits of all gates at one moment, float32 on the host.

    Args:
        widths: [quantizers, 4].
        ranks: [layers with rank gates, r - 1]; where a layer has fewer, closed gates of minus infinity follow.
        straight: [layers with rank gates] bool: whether the product is rounded (Alg. 1) or hard concrete (Eq. 12).
    """

    widths: Tensor
    ranks: Tensor
    straight: Tensor

    def open_widths(self) -> Tensor:
        """[quantizers] int64, how many gates of each chain are open at inference: 0 (2 bits) to 4 (32 bits)."""
        return chain.hard(hard_concrete.is_open(self.widths)).sum(dim=1)

    def open_ranks(self) -> Tensor:
        """[layers] int64, how many ranks beyond the first are open at inference."""
        rounded = torch.round(chain.cumulative(torch.sigmoid(self.ranks))) > 0
        chained = chain.hard(hard_concrete.is_open(self.ranks))
        return torch.where(self.straight[:, None], rounded, chained).sum(dim=1)

    def width_probabilities(self) -> Tensor:
        """[quantizers, 4] float64, probability that a quantizer uses at least 4, 8, 16 and 32 bits."""
        return chain.cumulative(hard_concrete.open_probability(self.widths.double()))

    def rank_probabilities(self) -> Tensor:
        """[layers, r - 1] float64, probability that ranks 2 to r are used."""
        logits = self.ranks.double()
        straight = chain.cumulative(torch.sigmoid(logits))
        return torch.where(self.straight[:, None], straight, chain.cumulative(hard_concrete.open_probability(logits)))


@dataclass(frozen=True)
class PerGate:
    """A number for every gate, such as what closing it costs; on the host.

    Args:
        widths: [quantizers, 4].
        ranks: [layers with rank gates, r - 1]; minus infinity where a layer has fewer.
    """

    widths: Tensor
    ranks: Tensor


class GateTable:
    """Where the gates of each layer lie in the matrices. It holds layers, never parameters.

    Args:
        model: a model with active Bayesian-LoRA adapters that have gates.
    """

    def __init__(self, model: nn.Module) -> None:
        self.holders: list[tuple[GatedLayer, str]] = []
        self._width_start: dict[tuple[int, str], int] = {}
        self._rank_slot: dict[tuple[int, str], int] = {}
        self.width_rows = self.rank_rows = 0
        for layer, name, gates in learning_adapters(model):
            self.holders.append((layer, name))
            if gates.bit_logits is not None:
                self._width_start[id(layer), name] = self.width_rows
                self.width_rows += gates.bit_logits.shape[0]
            if gates.rank_logits is not None:
                self._rank_slot[id(layer), name] = self.rank_rows
                self.rank_rows += 1

    def is_whole(self) -> bool:
        """Whether all layers still have the gates they had: a hardened model has none."""
        return all(layer.gates_of(name) is not None for layer, name in self.holders)

    def width_starts(self) -> dict[int, int]:
        """First row of each layer's width gates in the matrix, by the identity of the gates."""
        found = {}
        for layer, name in self.holders:
            gates, start = layer.gates_of(name), self._width_start.get((id(layer), name))
            if gates is not None and start is not None:
                found[id(gates)] = start
        return found

    def rank_slot(self, layer: GatedLayer, adapter: str) -> int | None:
        """Row of the matrix of ranks that is a layer's; None if its rank is not learned."""
        return self._rank_slot.get((id(layer), adapter))

    def sites(self) -> Tensor:
        """[quantizers] int64 on the host: which of `Site` each row of the width gates stands for."""
        kinds = list(Site)
        rows = [layer.rows_of(name) for layer, name in self.holders if (id(layer), name) in self._width_start]
        return torch.tensor([kinds.index(site) for sites in rows for site in sites], dtype=torch.int64)

    @torch.no_grad()
    def read(self) -> GateLogits:
        """The logits as they are now, copied to the host in one transfer each."""
        widths = [gates.bit_logits for gates in self._gates() if gates.bit_logits is not None]
        ranked = [gates for gates in self._gates() if gates.rank_logits is not None]
        ranks = [gates.rank_logits for gates in ranked if gates.rank_logits is not None]
        straight = [gates.rank_gate is RankGate.STRAIGHT_THROUGH for gates in ranked]
        return GateLogits(
            _on_host(widths).reshape(-1, WIDTH_GATES), _padded(ranks), torch.tensor(straight, dtype=torch.bool)
        )

    @torch.no_grad()
    def evidence(self) -> PerGate:
        """What closing each gate was measured to cost, float32, of any scale."""
        widths = [g.evidence for g in self._gates() if g.bit_logits is not None]
        ranks = [g.rank_evidence for g in self._gates() if g.rank_logits is not None]
        return PerGate(_on_host(widths).reshape(-1, WIDTH_GATES), _padded(ranks))

    def share_evidence(self) -> None:
        """Average what each process has measured on its own rows, so that all choose the same widths and ranks.

        After every step: between steps a data-parallel wrapper may give all processes the buffers of the first.
        """
        agree([tensor for gates in self._gates() for tensor in (gates.evidence, gates.rank_evidence)], Reduction.MEAN)

    @torch.no_grad()
    def set_evidence(self, evidence: PerGate) -> None:
        """Put back what `evidence` gave."""
        widths, ranks = iter(evidence.widths), iter(evidence.ranks)
        for gates in self._gates():
            if gates.bit_logits is not None:
                gates.evidence.copy_(torch.stack([next(widths) for _ in gates.evidence]))
            if gates.rank_logits is not None:
                gates.rank_evidence.copy_(next(ranks)[: len(gates.rank_evidence)])

    @torch.no_grad()
    def forget_evidence(self) -> None:
        """Begin to measure afresh."""
        for gates in self._gates():
            gates.evidence.zero_()
            gates.rank_evidence.zero_()

    @torch.no_grad()
    def write(self, before: GateLogits, logits: GateLogits) -> None:
        """Put logits into the layers where they are not what was read before."""
        changed_widths = (before.widths != logits.widths).any(dim=1)
        changed_ranks = (before.ranks != logits.ranks).any(dim=1)
        if not bool(changed_widths.any()) and not bool(changed_ranks.any()):
            return
        for layer, name in self.holders:
            gates = layer.gates_of(name)
            if gates is None:
                continue
            if gates.bit_logits is not None:
                rows = self._rows(layer, name, gates.bit_logits.shape[0])
                if bool(changed_widths[rows].any()):
                    gates.bit_logits.copy_(logits.widths[rows])
            if gates.rank_logits is not None:
                slot = self._rank_slot[id(layer), name]
                if bool(changed_ranks[slot]):
                    gates.rank_logits.copy_(logits.ranks[slot, : gates.rank_logits.numel()])

    def per_layer(self, widths: Tensor, ranks: Tensor) -> list[tuple[GatedLayer, str, Tensor, Tensor]]:
        """Cut matrices of the table's shapes into (layer, adapter, [sites, 4], [r - 1]) on each layer's device."""
        moved: dict[torch.device, tuple[Tensor, Tensor]] = {}
        parts = []
        for layer, name in self.holders:
            gates = layer.gates_of(name)
            if gates is None:
                continue
            device = layer.device_of(name)
            if device not in moved:
                moved[device] = widths.to(device), ranks.to(device)
            all_widths, all_ranks = moved[device]
            count = 0 if gates.bit_logits is None else gates.bit_logits.shape[0]
            rows = self._rows(layer, name, count) if count else slice(0, 0)
            slot, last = self._rank_slot.get((id(layer), name), 0), 0
            if gates.rank_logits is not None:
                last = gates.rank_logits.numel()
            parts.append((layer, name, all_widths[rows], all_ranks[slot, :last] if last else all_ranks.new_zeros(0)))
        return parts

    def _rows(self, layer: GatedLayer, name: str, count: int) -> slice:
        start = self._width_start[id(layer), name]
        return slice(start, start + count)

    def _gates(self) -> list[LayerGates]:
        found = [layer.gates_of(name) for layer, name in self.holders]
        return [gates for gates in found if gates is not None]


def pressed_probability(gates: LayerGates, widths: Tensor, ranks: Tensor) -> Tensor:
    """Sum of weights [sites, 4] and [r - 1] times the probability of each gate being open on its own, a scalar."""
    total = torch.zeros((), device=widths.device)
    if gates.bit_logits is not None:
        total = total + (widths * hard_concrete.open_probability(gates.bit_logits)).sum()
    if gates.rank_logits is not None:
        straight = gates.rank_gate is RankGate.STRAIGHT_THROUGH
        own = torch.sigmoid(gates.rank_logits) if straight else hard_concrete.open_probability(gates.rank_logits)
        total = total + (ranks * own).sum()
    return total


def _on_host(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(0)
    device = tensors[0].device
    return torch.cat([t.detach().to(device).reshape(-1) for t in tensors]).to("cpu", torch.float32)


def _padded(ranks: Sequence[Tensor]) -> Tensor:
    lengths = [values.numel() for values in ranks]
    padded = torch.full((len(ranks), max(lengths, default=0)), -torch.inf)
    for row, values in enumerate(_on_host(ranks).split(lengths) if ranks else ()):
        padded[row, : lengths[row]] = values
    return padded
