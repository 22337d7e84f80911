"""What each adapted layer has learned, and how certainly: ranks and widths as delivered and as expected, and gates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from rankbits.gates import chain
from rankbits.gates.hard_concrete import is_open, open_probability
from rankbits.quant.fixed_quantizer import FixedQuantizer
from rankbits.quant.grid import bits_of_gates, expected_bits
from rankbits.records.certainty import DecidingGate, marginals, rank_gates, width_gates
from rankbits.tuners.bayesian_lora.config import RankGate
from rankbits.tuners.bayesian_lora.find import GatedLayer, layers_of
from rankbits.tuners.bayesian_lora.head import QuantizedHeadLinear
from rankbits.tuners.bayesian_lora.layer import BayesianLoraLinear
from rankbits.tuners.bayesian_lora.layer_gates import LayerGates

_WRAPPER = "base_model.model."


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer, or a quantized linear layer of a head that is trained in full, which has no rank.

    Args:
        name: qualified name of the layer in the model that was asked.
        rank: rank with the gates of inference; 0 in a head.
        max_rank: rank the adapter started with; 0 in a head.
        expected_rank: mean rank under the gate probabilities; None where ranks have no gates (not learned, hardened).
        bits: site to bit width with the gates of inference; an input that siblings share is listed for each of them.
        expected_bits: site to mean bit width under the gate probabilities.
        bit_open_probabilities: site to the probability that each gate of 4, 8, 16 and 32 bits is open, on its own:
            sigmoid(logit + 1.5986), Bayesian-LoRA Eq. 13. Empty once hardened.
        rank_open_probabilities: the same for the gates of ranks 2 to r; for straight-through gates sigmoid(logit).
        rank_gate: how rank gates get their value, "ste" or "hard_concrete"; None where ranks have no gates.
        shared: site to the layer that owns its gates (or, once hardened, its quantizer), where that is another one.
        quantized_base: whether the base was loaded in few bits (bitsandbytes, torchao): its weight keeps that grid, and
            has neither a quantizer of ours nor an entry in `bits`.
    """

    name: str
    rank: int
    max_rank: int
    expected_rank: float | None
    bits: dict[str, int]
    expected_bits: dict[str, float]
    bit_open_probabilities: dict[str, tuple[float, ...]] = field(default_factory=dict)
    rank_open_probabilities: tuple[float, ...] = ()
    rank_gate: str | None = None
    shared: dict[str, str] = field(default_factory=dict)
    quantized_base: bool = False

    def width_marginals(self) -> dict[str, list[float]]:
        """Site to the probability of at least 4, 8, 16 and 32 bits: of that gate and all before it being open."""
        return {site: marginals(probabilities) for site, probabilities in self.bit_open_probabilities.items()}

    def rank_marginals(self) -> list[float]:
        """Probability that the rank is at least 2, 3 and so on."""
        return marginals(self.rank_open_probabilities)

    def deciding_gates(self) -> list[DecidingGate]:
        """The gates that decide the rank and the widths here, with their distance from the threshold."""
        found = [] if self.rank_gate is None else rank_gates(self.rank_open_probabilities, self.rank_gate)
        for site, probabilities in self.bit_open_probabilities.items():
            found += width_gates(site, probabilities)
        return found

    def least_certain(self) -> DecidingGate | None:
        """The deciding gate nearest to its threshold; None where nothing is learned."""
        return min(self.deciding_gates(), key=lambda gate: gate.margin, default=None)


class ModelSummary(list[LayerSummary]):
    """The layers of a model, in module order; as text, a table."""

    def __str__(self) -> str:
        """Rank and widths of every layer, in brackets those expected under the gates, and the least certain gate."""
        if not self:
            return "no layer has this adapter"
        sites = list(dict.fromkeys(site for entry in self for site in entry.bits))
        rows = [("layer", "rank", *sites, "least certain gate"), *(_row(entry, sites) for entry in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *_notes(self)])


def _row(entry: LayerSummary, sites: Sequence[str]) -> tuple[str, ...]:
    rank = f"{entry.rank} of {entry.max_rank}" + _expected(entry.expected_rank) if entry.max_rank else "in full"
    cells = [_cell(entry, site) if site in entry.bits else "" for site in sites]
    gate = entry.least_certain()
    return (entry.name.removeprefix(_WRAPPER), rank, *cells, gate.text if gate is not None else "")


def _cell(entry: LayerSummary, site: str) -> str:
    learns = site in entry.bit_open_probabilities
    return f"{entry.bits[site]}{'=' if site in entry.shared else ''}" + _expected(
        entry.expected_bits[site] if learns else None
    )


def _expected(mean: float | None) -> str:
    return "" if mean is None else f" ({mean:.1f})"


def _notes(entries: Iterable[LayerSummary]) -> list[str]:
    listed = list(entries)
    notes = ["", "Rank and bits at inference"]
    if any(entry.expected_rank is not None or entry.bit_open_probabilities for entry in listed):
        notes[-1] += ", in brackets the means under the gate probabilities"
    if not all(entry.max_rank for entry in listed):
        notes[-1] += "; in full: a head without a low-rank update"
    if any(entry.shared for entry in listed):
        notes[-1] += "; = shared with a layer that reads the same tensor or has the same width by request"
    kept = sum(entry.quantized_base for entry in listed)
    if kept:
        of = "all" if kept == len(listed) else f"{kept} of {len(listed)}"
        notes[-1] += f"; weights of {of} layers keep the grid that the base was loaded with, and have no quantizer here"
    notes[-1] += "."
    return notes


@torch.no_grad()
def summarize(model: nn.Module, adapter_name: str = "default") -> ModelSummary:
    """Ranks and bit widths of every layer that has the adapter, and their certainty, whatever mode the model is in.

    Args:
        model: a PEFT model, or a model with injected adapters, hardened or not.
        adapter_name: which adapter.

    Returns:
        One entry per layer in module order, a list that prints as a table; empty if no layer has the adapter.
    """
    layers = dict(layers_of(model, adapter_name))
    owners = {part: name for name, layer in layers.items() for part in _own_parts(layer, adapter_name)}
    return ModelSummary(_layer_summary(name, layer, adapter_name, owners) for name, layer in layers.items())


summary = summarize
"""The same under the name that `rankbits.summary(model)` has."""


def _own_parts(layer: GatedLayer, adapter_name: str) -> list[int]:
    """Identities of the gates and quantizers that a layer owns."""
    gates = layer.gates_of(adapter_name)
    parts = [id(module) for module in layer.quantizers_of(adapter_name).values()]
    return parts if gates is None else [*parts, id(gates)]


def _layer_summary(name: str, layer: GatedLayer, adapter_name: str, owners: dict[int, str]) -> LayerSummary:
    bits: dict[str, int] = {}
    expected: dict[str, float] = {}
    single: dict[str, tuple[float, ...]] = {}
    shared: dict[str, str] = {}
    for site in layer.effective_sites(adapter_name):
        key = site.value
        gate, quantizer = layer.gate_of(adapter_name, site), layer.quantizer_of(adapter_name, site)
        owner = owners.get(id(quantizer if gate is None else gate[0]), name)
        if owner != name:
            shared[key] = owner
        if gate is None:
            assert isinstance(quantizer, FixedQuantizer), f"{name}: {key} has neither gates nor one width"
            bits[key], expected[key] = quantizer.bits, float(quantizer.bits)
        else:
            bits[key], expected[key], single[key] = _width(*gate)
    gates = layer.gates_of(adapter_name)
    rank, maximum, expected_rank, open_ranks = _rank(layer, adapter_name, gates)
    kind = gates.rank_gate.value if gates is not None and open_ranks else None
    kept = isinstance(layer, BayesianLoraLinear) and layer.quantization_backend is not None
    return LayerSummary(name, rank, maximum, expected_rank, bits, expected, single, open_ranks, kind, shared, kept)


def _width(gates: LayerGates, row: int) -> tuple[int, float, tuple[float, ...]]:
    """Bits at inference, mean bits, and the open probability of each gate, of one row of width gates."""
    assert gates.bit_logits is not None
    logits = gates.bit_logits[row]
    probabilities = open_probability(logits)
    hard = int(bits_of_gates(chain.hard(is_open(logits))))
    return hard, float(expected_bits(chain.cumulative(probabilities))), tuple(probabilities.tolist())


def _rank(
    layer: GatedLayer, adapter_name: str, gates: LayerGates | None
) -> tuple[int, int, float | None, tuple[float, ...]]:
    """Rank at inference and at the start, mean rank (None without gates), and the open probability of each gate."""
    if isinstance(layer, QuantizedHeadLinear):
        return 0, 0, None, ()
    maximum = layer.r[adapter_name]
    if gates is None:
        return layer.bayesian_lora_down[adapter_name].shape[0], maximum, None, ()
    values, held = gates.values(hard=True), gates.rank_probabilities()
    if values.ranks is None or held is None or gates.rank_logits is None:
        return maximum, maximum, None, ()
    rounded = gates.rank_gate is RankGate.STRAIGHT_THROUGH
    single = torch.sigmoid(gates.rank_logits) if rounded else open_probability(gates.rank_logits)
    return int(values.ranks.sum()), maximum, 1.0 + float(held.sum()), tuple(single.tolist())
