"""Gates that stand still: uniform widths, or learned widths and ranks dealt out to other layers at the same cost."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankbits.quant.grid import GATED_WIDTHS
from rankbits.records import RunRecord
from rankbits.tuners.bayesian_lora import learning_adapters
from rankbits.tuners.bayesian_lora.find import adapted_layers

OPEN, CLOSED = 8.0, -4.0
"""The bounds within which a schedule keeps logits, far on either side of the threshold."""
INPUT, WEIGHT = "input", "weight"
PEFT_PREFIX = "base_model.model."
"""What a PEFT model puts before the names of the layers it adapts."""
ATTEMPTS = 100


@dataclass(frozen=True)
class Wanted:
    """What the gates of one layer are set to.

    Args:
        bits: site to width; sites that are not named stay open.
        rank: None keeps all ranks.
    """

    bits: Mapping[str, int]
    rank: int | None = None


Allocation = Callable[[str], Wanted]
"""From a layer's name in the record of a run to what its gates are set to."""


class SetGates(TrainerCallback):
    """Sets the gates as the fixed phase begins, in time for the schedule to fit the ranges to their widths.

    Args:
        allocation: what each layer gets.
        fixed: share of the steps with fixed gates, as the schedule has it.
    """

    def __init__(self, allocation: Allocation, fixed: float) -> None:
        self.allocation = allocation
        self.fixed = fixed

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the logits in the last step before the phase; a run that resumes later finds them in its checkpoint."""
        fixed_from = state.max_steps - round(self.fixed * state.max_steps)
        if fixed_from < 1:
            raise ValueError(f"all {state.max_steps} steps have fixed gates: expected a step before, to set them in")
        if state.global_step + 1 == fixed_from:
            set_gates(kwargs["model"], self.allocation)


@torch.no_grad()
def set_gates(model: torch.nn.Module, allocation: Allocation) -> None:
    """Open and close gates so that those of inference stand for the widths and ranks given."""
    names = {id(layer): name.removeprefix(PEFT_PREFIX) for name, layer in adapted_layers(model)}
    for layer, adapter, gates in learning_adapters(model):
        wanted = allocation(names[id(layer)])
        for site in layer.sites_of(adapter):
            owner = layer.gate_of(adapter, site)
            if owner is not None and owner[0].bit_logits is not None and site.value in wanted.bits:
                open_ = torch.tensor([width <= wanted.bits[site.value] for width in GATED_WIDTHS])
                owner[0].bit_logits[owner[1]] = torch.where(open_, OPEN, CLOSED)
        if gates.rank_logits is not None and wanted.rank is not None:
            kept = torch.arange(len(gates.rank_logits)) < wanted.rank - 1
            gates.rank_logits.copy_(torch.where(kept, OPEN, CLOSED))


def uniform(weight_bits: int, input_bits: int) -> Allocation:
    """The same widths and the full rank everywhere."""
    wanted = Wanted({WEIGHT: weight_bits, INPUT: input_bits})
    return lambda _name: wanted


@dataclass(frozen=True)
class Unit:
    """A layer of a finished run as it is dealt out.

    Args:
        name: of the layer.
        macs: multiply-accumulates of its product with W0, per sequence.
        weight: learned width of the weight.
        rank: learned rank.
        source: name of the layer that owns its input quantizer: itself, or the first that reads the same tensor.
        input: learned width of its input.
    """

    name: str
    macs: int
    weight: int
    rank: int
    source: str
    input: int


def permuted(record: RunRecord, *, seed: int) -> Allocation:
    """A random permutation of learned widths and ranks over the layers, of exactly the same bit operations.

    What is dealt out is what layers that read one tensor have learned together: the width of that input, and width and
    rank of each weight (query, key and value move as one). It goes to layers of the same sizes, in another block or,
    where sizes agree, of another kind: so neither the cost nor the pairs of widths that make it up change.

    Raises:
        ValueError: layers of the same sizes have all learned the same, so that there is no permutation.
    """
    readers: dict[str, list[Unit]] = {}
    for unit in units_of(record):
        readers.setdefault(unit.source, []).append(unit)
    alike: dict[tuple[int, ...], list[str]] = {}
    for source, group in readers.items():
        alike.setdefault(tuple(unit.macs for unit in group), []).append(source)
    generator = random.Random(seed)
    for _ in range(ATTEMPTS):
        donors = {
            s: d for sources in alike.values() for s, d in zip(sources, _shuffled(sources, generator), strict=True)
        }
        pairs = [pair for s, d in donors.items() for pair in zip(readers[s], readers[d], strict=True)]
        dealt = {unit.name: Wanted({WEIGHT: other.weight, INPUT: other.input}, other.rank) for unit, other in pairs}
        if any(
            (unit.weight, unit.input, unit.rank) != (other.weight, other.input, other.rank) for unit, other in pairs
        ):
            return dealt.__getitem__
    raise ValueError("layers of the same sizes have all learned the same widths and ranks: nothing to permute")


def _shuffled(names: Sequence[str], generator: random.Random) -> list[str]:
    return generator.sample(names, len(names))


def units_of(record: RunRecord) -> list[Unit]:
    """The layers of a finished run whose weights and inputs have learned widths."""
    if record.costs is None:
        raise ValueError("the record has no costs, so nobody knows what its layers cost")
    macs = {product.module: product.macs for product in record.costs.products if product.op == "linear"}
    return [
        Unit(
            name=module.name,
            macs=macs[module.name],
            weight=module.bits["weight"],
            rank=module.rank,
            source=module.shared.get("input", module.name).removeprefix(PEFT_PREFIX),
            input=module.bits["input"],
        )
        for module in record.modules
    ]
