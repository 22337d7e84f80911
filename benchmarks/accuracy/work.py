"""From a point to its result: by a recipe, with gates that we set, by AdaLoRA, or by rounding what LoRA left."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from points import POINTS, Kind, Point
from scratch import RESULTS, result_file, run_folder
from transformers import TrainerCallback

from rankbits.recipes.load import load
from rankbits.recipes.run import run
from rankbits.recipes.schema import Recipe
from rankbits.records import RunRecord, write_atomically

UNMOVED = ("gates.lambda_q=0", "gates.lambda_r=0", "gates.learning_rate=1e-8")
"""Until they are set, gates stay open as in the warm-up of learned ones; a rate of zero is no rate."""


def result_of(point: Point) -> None:
    """Work out a point and store its result. Whatever rankbits raises comes through; nothing is stored then."""
    RESULTS.mkdir(exist_ok=True)
    path = result_file(point.name)
    if point.kind is Kind.RECIPE:
        trained(point).write(path)
    elif point.kind is Kind.FIXED:
        _fixed(point).write(path)
    elif point.kind is Kind.ADALORA:
        from adalora import train

        train(recipe_of(point), command=command_of(point)).write(path)
    else:
        write_atomically(path, json.dumps(_rounded(point), indent=2, allow_nan=False) + "\n")


def recipe_of(point: Point, *more: str) -> Recipe:
    """The recipe of a point, with its run folder."""
    return load(point.recipe, [*point.changes, *more, f"output={run_folder(point.name)}"])


def command_of(point: Point) -> str:
    """What a reader types to get the same: `rankbits train` where a recipe says it all."""
    if point.kind is Kind.RECIPE:
        return shlex.join(["rankbits", "train", point.recipe, *point.changes])
    return shlex.join(["benchmarks/accuracy/run.py", "--only", point.name])


def trained(point: Point) -> RunRecord:
    """The finished run of a recipe; at once if its folder is there, else trained, from a checkpoint if there is one."""
    return run(recipe_of(point), command=command_of(point), announce=_say)


def named(name: str) -> Point:
    """The point of that name."""
    return next(point for point in POINTS if point.name == name)


def _fixed(point: Point) -> RunRecord:
    from fixed_gates import SetGates, permuted, uniform

    if point.widths is not None:
        wanted = uniform(*point.widths)
    else:
        source = RunRecord.read(result_file(str(point.source)))
        wanted = permuted(source, seed=point.seed)
    # The steps in which gates would learn are spent with fixed ones: these train longer at their final widths.
    fixed = 1 - recipe_of(point).gates.warmup
    recipe = recipe_of(point, "gates.ramp=0", f"gates.fixed={fixed:g}", *UNMOVED)
    callbacks: Sequence[TrainerCallback] = [SetGates(wanted, recipe.gates.fixed)]
    return run(recipe, command=command_of(point), callbacks=callbacks, announce=_say)


def _rounded(point: Point) -> dict[str, Any]:
    from rounded import by_our_arithmetic, by_torchao

    source = named(str(point.source))
    trained(source)  # Its adapter is not in git: where the folder is gone, it is trained again.
    make = by_torchao if point.kind is Kind.FOREIGN else by_our_arithmetic
    adapter: Path = run_folder(source.name) / "adapter"
    return {"point": point.name, "command": command_of(point), **make(recipe_of(source), adapter)}


def _say(text: str) -> None:
    print(text, flush=True)
