"""Optimizer groups: adapters follow the task's learning rate, gates and ranges have rates of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rankbits.gates.hard_concrete import OPEN_LOGIT
from rankbits.training.budget import CONTESTED
from rankbits.training.schedule import GateSchedule
from rankbits.tuners.bayesian_lora import learning_adapters
from rankbits.tuners.bayesian_lora.config import Site

GATES_IN_TURN = 6
"""Under a budget all four gates of a chain may have to close in turn, and gates that return close again."""


class Decay(str, Enum):
    """How the task's learning rate falls after its warm-up."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


@dataclass(frozen=True)
class GateRates:
    """Learning rates of what is not an adapter weight.

    Args:
        gates: rate of all gate logits; None takes the rate at which the penalty alone would just close a gate within
            the penalised steps.
        ranges: rate of the logarithms of the ranges.
        eps: Adam's epsilon for the gates. Adam makes steps of equal size of gradients of any size above it; a larger
            value lets the strength of the penalty matter.
    """

    gates: float | None = None
    ranges: float = 1e-3
    eps: float = 1e-8


def automatic_gate_rate(initial_logit: float, penalised_steps: int, *, gates_in_turn: int = 1) -> float:
    """Rate at which gates that only the penalty moves reach their threshold at the end of the penalised steps.

    Args:
        initial_logit: where the first of them starts.
        penalised_steps: optimizer steps in which they are pressed.
        gates_in_turn: gates of one chain that are pressed one after another from the same start.
    """
    return gates_in_turn * (initial_logit - OPEN_LOGIT) / max(penalised_steps, 1)


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    gate_rate: float,
    rates: GateRates,
    rank_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group.

    Args:
        model: a model with Bayesian-LoRA adapters.
        learning_rate: of adapters, head and whatever else is trained.
        weight_decay: of their matrices; vectors, gates and ranges are never decayed, because decay would pull a gate
            towards open.
        gate_rate: of the gate logits.
        rates: of the ranges, and Adam's epsilon for the gates.
        rank_rate: of the logits of rank gates, if it is another.

    Returns:
        Groups named "matrices", "vectors", "gates", "rank_gates", "ranges", "fitted_ranges" (of activations that are
        fitted to their widths) and "weight_ranges" (of layers and head), without empty ones; all gates are in one where
        they have one rate.
    """
    gates = [p for _, _, g in learning_adapters(model) for p in g.parameters()]
    apart = rank_rate is not None and rank_rate != gate_rate
    ranked = {id(g.rank_logits) for _, _, g in learning_adapters(model)} if apart else set()
    ranges: dict[str, list[nn.Parameter]] = {"ranges": [], "fitted_ranges": [], "weight_ranges": []}
    for layer, name, _ in learning_adapters(model):
        for site, quantizer in layer.quantizers_of(name).items():
            activations = "fitted_ranges" if quantizer.fits_passes else "ranges"
            ranges["weight_ranges" if site == Site.WEIGHT.value else activations].extend(quantizer.parameters())
    special = {id(p) for p in (*gates, *chain.from_iterable(ranges.values()))}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in special]
    groups: list[dict[str, Any]] = [
        {"name": "matrices", "params": [p for p in rest if p.ndim >= 2], "lr": learning_rate, "decay": weight_decay},
        {"name": "vectors", "params": [p for p in rest if p.ndim < 2], "lr": learning_rate, "decay": 0.0},
        _gate_group("gates", [p for p in gates if id(p) not in ranked], gate_rate, rates),
        _gate_group("rank_gates", [p for p in gates if id(p) in ranked], rank_rate or gate_rate, rates),
        *({"name": name, "params": found, "lr": rates.ranges, "decay": 0.0} for name, found in ranges.items()),
    ]
    for group in groups:
        group["weight_decay"] = group.pop("decay")
    return [group for group in groups if group["params"]]


def _gate_group(name: str, gates: list[nn.Parameter], rate: float, rates: GateRates) -> dict[str, Any]:
    return {"name": name, "params": gates, "lr": rate, "decay": 0.0, "eps": rates.eps}


def decay_factor(step: int, *, total_steps: int, warmup_steps: int, decay: Decay) -> float:
    """Share of the task's learning rate at an optimizer step counted from 0."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if decay is Decay.LINEAR:
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if decay is Decay.COSINE else 1.0


def optimizer_and_scheduler(
    schedule: GateSchedule,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    decay: str = "linear",
    warmup_steps: int = 0,
    rates: GateRates | None = None,
) -> tuple[AdamW, LambdaLR]:
    """AdamW and its scheduler for a Bayesian-LoRA model: hand both to the Trainer as `optimizers=`.

    Args:
        schedule: the gate schedule of the model; give the same one to `RankbitsCallback`.
        learning_rate: peak rate of adapters and head.
        weight_decay: of their matrices.
        decay: "linear", "cosine" or "constant".
        warmup_steps: steps in which that rate grows linearly from zero.
        rates: constant rates of gates and ranges; that of ranges which are fitted to their widths falls in the end.

    Returns:
        The optimizer, and a scheduler under which adapters and head decay, and the rate of ranges that are fitted, of
        weights and of activations, falls to zero over the steps with fixed gates: they only have to settle then.
    """
    rates = rates or GateRates()
    gate_rate, rank_rate = _gate_rates(schedule) if rates.gates is None else (rates.gates, rates.gates)
    groups = parameter_groups(
        schedule.model,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        gate_rate=gate_rate,
        rates=rates,
        rank_rate=rank_rate,
    )
    optimizer = AdamW(groups, lr=learning_rate)

    def task_factor(step: int) -> float:
        return decay_factor(step, total_steps=schedule.total_steps, warmup_steps=warmup_steps, decay=Decay(decay))

    def constant(_step: int) -> float:
        return 1.0

    def settling(step: int) -> float:
        return decay_factor(
            max(step - schedule.fixed_from, 0),
            total_steps=schedule.total_steps - schedule.fixed_from,
            warmup_steps=0,
            decay=Decay.LINEAR,
        )

    factor_of: dict[str, Callable[[int], float]] = {
        "gates": constant,
        "rank_gates": constant,
        "ranges": constant,
        "fitted_ranges": settling,
        "weight_ranges": settling,
    }
    factors = [factor_of.get(group["name"], task_factor) for group in optimizer.param_groups]
    return optimizer, LambdaLR(optimizer, factors)


def _gate_rates(schedule: GateSchedule) -> tuple[float, float]:
    """Automatic rates of width gates and of rank gates: those that a budget presses close one after another."""
    tops = [p.detach().max() for _, _, g in learning_adapters(schedule.model) for p in g.parameters() if p.numel()]
    highest = float(torch.stack([t.cpu() for t in tops]).max()) if tops else 0.0
    # Without penalised steps gates only drift with the data, and a rate that would close them in one step is noise.
    steps = schedule.penalised_steps or schedule.total_steps
    together = automatic_gate_rate(highest, steps)
    in_turn = automatic_gate_rate(CONTESTED, steps, gates_in_turn=GATES_IN_TURN)
    controller = schedule.controller
    if controller is None:
        return together, together
    return (
        in_turn if controller.presses_widths() else together,
        in_turn if controller.presses_ranks() else together,
    )
