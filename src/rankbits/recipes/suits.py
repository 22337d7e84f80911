"""What a recipe asks of a method or task that cannot honour it: refused, where ignoring it would be another run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from rankbits.accounting.mora import BLOCKWISE
from rankbits.recipes.budgets import contradicted
from rankbits.recipes.grids import misplaced
from rankbits.recipes.problems import Problem
from rankbits.recipes.schema import Recipe
from rankbits.recipes.sizes import sbora_variant


def unsuited(recipe: Recipe) -> list[Problem]:
    """Settings that the recipe's method or task cannot honour.

    Settings of other methods are no problem, so that one recipe serves several; they are not read.
    """
    checks = (_start, _budget, _gates, _mora, _sbora, _dylora, _adalora, _prefix)
    return list(chain.from_iterable(check(recipe) for check in checks))


def _start(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.task.start_at_mean:
        return
    # Imported here: tasks build on numpy, which a recipe's other checks do not need.
    from rankbits import tasks

    if tasks.get(recipe.task.name).kind != "regression":
        yield Problem(
            "task.start_at_mean",
            f"given true, expected false with task {recipe.task.name!r}: only labels of a regression have a mean",
        )


def _budget(recipe: Recipe) -> Iterator[Problem]:
    if recipe.gates.budget is not None and recipe.method != "bayesian-lora":
        yield Problem(
            "gates.budget",
            f"given {recipe.gates.budget!r}, expected null with method={recipe.method}: only bayesian-lora learns "
            "ranks and bits until a budget is met",
        )


def _gates(recipe: Recipe) -> Iterator[Problem]:
    if recipe.method == "bayesian-lora":
        yield from misplaced(recipe)
        yield from contradicted(recipe)


def _mora(recipe: Recipe) -> Iterator[Problem]:
    settings = recipe.adapter.mora
    kind = settings.kind(recipe.adapter.r)
    if recipe.method == "mora" and settings.fold and kind not in BLOCKWISE:
        expected = " and ".join(BLOCKWISE)
        yield Problem("adapter.mora.fold", f"given true, expected false with type {kind}: only {expected} can fold")


def _sbora(recipe: Recipe) -> Iterator[Problem]:
    given, used = recipe.adapter.sbora.variant, sbora_variant(recipe)
    if recipe.method.startswith("sbora-") and given not in (None, used):
        yield Problem(
            "adapter.sbora.variant", f"given the text {given!r}, expected {used} or null with method={recipe.method}"
        )


def _dylora(recipe: Recipe) -> Iterator[Problem]:
    settings, r = recipe.adapter.dylora, recipe.adapter.r
    if recipe.method != "dylora":
        return
    if settings.evaluation_rank is not None and settings.evaluation_rank > r:
        yield Problem("adapter.dylora.evaluation_rank", f"given {settings.evaluation_rank}, expected at most r={r}")
    if any(rank > r for rank in settings.evaluate_ranks):
        yield Problem("adapter.dylora.evaluate_ranks", f"given {settings.evaluate_ranks}, expected at most r={r} each")


def _adalora(recipe: Recipe) -> Iterator[Problem]:
    given, r = recipe.adapter.adalora.initial_rank, recipe.adapter.r
    if recipe.method == "adalora" and given is not None and given < r:
        yield Problem("adapter.adalora.initial_rank", f"given {given}, expected at least r={r}, the mean that is left")


def _prefix(recipe: Recipe) -> Iterator[Problem]:
    if recipe.method == "prefix" and recipe.training.gradient_checkpointing:
        yield Problem(
            "training.gradient_checkpointing",
            "given true, expected false with method=prefix: a prefix is a cache, which checkpointed blocks do not read",
        )
