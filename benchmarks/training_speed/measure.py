"""Measures one case in this process and prints it as JSON: steps of two sides in turn, a peak, or quantizers."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rankbits.quant import kernels, reference
from rankbits.quant.codes import round_to_grid
from rankbits.recipes import facts

WARM_UP = 3
SHAPES = {
    "2048 x 384": ((2048, 384), ()),
    "2048 x 1536": ((2048, 1536), ()),
    "384 x 384, groups of 64": ((384, 6, 64), (384, 6, 1)),
    "1536 x 384, groups of 64": ((1536, 6, 64), (1536, 6, 1)),
}
"""Name to the shapes of the tensor and of its ranges."""


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round; every second round goes backwards, so that none is always the first."""
    for function in functions.values():
        for _ in range(WARM_UP):
            function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(rounds):
        names = list(functions)
        for name in names if index % 2 == 0 else names[::-1]:
            taken[name].append(seconds(functions[name]))
    return taken


def steps(modules: str, variant: str, shape: tuple[int, int], rounds: int, changes: tuple[str, ...]) -> dict[str, Any]:
    """Seconds of a training step of LoRA and of one of ours, by phase; `shape` is rows and tokens of a batch."""
    from sides import MODULES, MOMENTS, Side, batch_of, recipe

    rows = batch_of(*shape)
    settings = {name: recipe(name, (MODULES[modules], *changes)) for name in ("lora", variant)}
    sides = {name: Side(found, rows) for name, found in settings.items()}
    found: dict[str, Any] = {}
    for moment, completed in MOMENTS[variant].items():
        for side in sides.values():
            side.enter(moment, completed)
        found[moment] = in_turn({name: side.step for name, side in sides.items()}, rounds)
    return {"adapter": settings[variant].adapter.model_dump(), "seconds": found}


def peak(modules: str, variant: str, shape: tuple[int, int], rounds: int, changes: tuple[str, ...]) -> dict[str, Any]:
    """Largest resident bytes of a process that makes a few steps of one side in every phase."""
    from sides import MODULES, MOMENTS, Side, batch_of, recipe

    side = Side(recipe(variant, (MODULES[modules], *changes)), batch_of(*shape))
    for moment, completed in MOMENTS["q-ra" if variant == "lora" else variant].items():
        side.enter(moment, completed)
        for _ in range(rounds):
            side.step()
    return {"peak_bytes": facts.peak_memory_bytes()}


def _both_ways(quantize: Callable[..., Tensor], x: Tensor, beta: Tensor, last: Tensor) -> Callable[[], object]:
    x, beta = x.clone().requires_grad_(), beta.clone().requires_grad_()
    wanted = [x, beta, *([last] if last.requires_grad else [])]
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(quantize(x, beta, last), wanted, grad)


def quantizers(rounds: int) -> dict[str, Any]:
    """Seconds of the quantizer, fused and as plain autograd of the reference, and of a copy, by shape."""
    generator = torch.Generator().manual_seed(0)
    soft, width = torch.tensor([0.9, 0.7, 0.5, 0.3], requires_grad=True), torch.tensor(4)
    found = {}
    for name, (shape, of_range) in SHAPES.items():
        x = torch.randn(shape, generator=generator)
        beta, room = torch.rand(of_range, generator=generator) + 1.0, torch.empty(shape)
        cases: dict[str, Callable[[], object]] = {
            "fused": _both_ways(kernels.quantize, x, beta, soft),
            "reference": _both_ways(reference.quantize, x, beta, soft),
            "fused, forward": lambda x=x, beta=beta: kernels.quantize(x, beta, soft),
            "one width": _both_ways(round_to_grid, x, beta, width),
            "one width, forward": lambda x=x, beta=beta: round_to_grid(x, beta, width),
            "copy": lambda x=x, room=room: room.copy_(x),
        }
        found[name] = in_turn(cases, rounds)
    return {"seconds": found}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["steps", "peak", "quantizers"])
    parser.add_argument("--modules", default="all")
    parser.add_argument("--variant", default="q-ra")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--set", action="append", default=[], help="key=value, as `rankbits train` takes it")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if given.what == "quantizers":
        found = quantizers(given.rounds)
    else:
        measure = steps if given.what == "steps" else peak
        found = measure(given.modules, given.variant, (given.batch, given.length), given.rounds, tuple(given.set))
    print(json.dumps({**found, "versions": facts.versions(), "machine": facts.machine()}))


if __name__ == "__main__":
    main()
