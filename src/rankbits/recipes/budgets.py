"""The budgets of a recipe, and what it says beside them that no model could reconcile with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from math import inf

from rankbits.accounting.budget import WIDTHS, Budget, Quantity, Scope, parse_budget
from rankbits.recipes.grids import learned_sites, quantizers_as_said
from rankbits.recipes.problems import Problem
from rankbits.recipes.schema import Recipe


def budgets_of(recipe: Recipe) -> list[Budget]:
    """The budgets of a recipe, at its task's longest rows."""
    gates = recipe.gates
    texts = [gates.budget] if isinstance(gates.budget, str) else gates.budget or []
    length = recipe.task.max_length
    return [parse_budget(text, gates.reference_bits, sequence_length=length, scope=gates.scope) for text in texts]


def contradicted(recipe: Recipe) -> Iterator[Problem]:
    """What training would refuse, or ignore, of a recipe for learned gates, whatever its model: problems with keys."""
    budgets = budgets_of(recipe)
    if budgets:
        meant = [*_repeated(recipe, budgets), *_without_gates(recipe, budgets)]
        yield from meant or _limits(recipe, budgets)
        yield from chain.from_iterable(check(recipe, budgets) for check in (_scope, _penalties, _steps))
    elif recipe.gates.allocation == "evidence":
        yield Problem(
            "gates.allocation",
            "given the text 'evidence', expected null or descent without gates.budget, by which alone evidence can "
            "choose",
        )


def _repeated(recipe: Recipe, budgets: Sequence[Budget]) -> Iterator[Problem]:
    quantities = [budget.quantity for budget in budgets]
    several = [quantity for quantity in Quantity if quantities.count(quantity) > 1]
    if several:
        yield Problem(
            "gates.budget",
            f"given {recipe.gates.budget!r}, expected one of each quantity, not several of {_names(several)}",
        )


def _without_gates(recipe: Recipe, budgets: Sequence[Budget]) -> Iterator[Problem]:
    adapter = recipe.adapter
    if _limits_ranks(budgets) and not _learns_ranks(recipe):
        cause = "adapter.r=1" if adapter.learn_rank else "adapter.learn_rank=false"
        yield _unmeetable(recipe, Quantity.RANK.value, cause, "rank")
    of_widths = [budget.quantity for budget in budgets if budget.quantity is not Quantity.RANK]
    if of_widths and not (learned_sites(adapter) or adapter.quantize_attention or adapter.quantize_head):
        yield _unmeetable(recipe, _names(of_widths), quantizers_as_said(adapter), "width")


def _unmeetable(recipe: Recipe, limited: str, cause: str, what: str) -> Problem:
    given = f"given {recipe.gates.budget!r}, expected no limit of {limited} with {cause}"
    return Problem("gates.budget", f"{given}: no {what} could meet it")


def _limits(recipe: Recipe, budgets: Sequence[Budget]) -> Iterator[Problem]:
    """Limits that no model could meet; which shares one model reaches is not known before it is."""
    narrowest, widest = WIDTHS[0], WIDTHS[-1]
    # Beside a rounded sum nothing is multiplied; bytes have scales in them, of which a model has more or fewer.
    alone = recipe.adapter.placement == "merged" and "weight" in learned_sites(recipe.adapter)
    for budget in budgets:
        reference = budget.reference_bits
        low, high = {
            Quantity.BITS: (narrowest, widest),
            Quantity.RANK: (1, recipe.adapter.r),
            Quantity.BYTES: (narrowest / reference, inf),
            Quantity.BOPS: (narrowest**2 / reference**2, widest**2 / reference**2 if alone else inf),
        }[budget.quantity]
        if not low <= budget.limit <= high:
            wanted = f"at least {low:.6g}" if high == inf else f"{low:.6g} to {high:.6g}"
            yield Problem("gates.budget", f"given {str(budget)!r}, expected {budget.quantity.value} of {wanted}")


def _scope(recipe: Recipe, budgets: Sequence[Budget]) -> Iterator[Problem]:
    if recipe.gates.scope == Scope.MODEL.value and all(budget.quantity is not Quantity.BOPS for budget in budgets):
        yield Problem(
            "gates.scope",
            f"given the text 'model', expected adapted {_beside(recipe)}: only bops are counted of a whole model",
        )


def _penalties(recipe: Recipe, budgets: Sequence[Budget]) -> Iterator[Problem]:
    """Penalties on gates that a budget presses, and what describes a penalty where none ever acts."""
    gates, quantities = recipe.gates, {budget.quantity for budget in budgets}
    # Ranks cost operations and bytes where factors lie beside the weight; a mean over weights is not lowered by them.
    paid_with_ranks = quantities & {Quantity.BOPS, Quantity.BYTES} if recipe.adapter.placement == "separate" else set()
    presses_ranks = _limits_ranks(budgets) or (bool(paid_with_ranks) and _learns_ranks(recipe))
    pressed = {"lambda_q": quantities != {Quantity.RANK}, "lambda_r": presses_ranks}
    idle = {"lambda_q": "0 or null", "lambda_r": "0 or null", "weighting": "const", "reduction": "sum"}
    for name, usual in idle.items():
        given = getattr(gates, name)
        said = f"{given:g}" if isinstance(given, float) else repr(given)
        if given is not None and pressed.get(name):
            yield Problem(
                f"gates.{name}", f"given {said}, expected null {_beside(recipe)}, which presses the same gates"
            )
        elif given and given != usual and _by_evidence(recipe, budgets):
            yield Problem(
                f"gates.{name}",
                f"given {said}, expected {usual} {_beside(recipe)}, or gates.allocation=descent: by evidence all "
                "gates are chosen when the warm-up ends, before a penalty acts",
            )


def _steps(recipe: Recipe, budgets: Sequence[Budget]) -> Iterator[Problem]:
    """Phases without the steps in which gates are chosen, counted as the schedule counts where the length is known."""
    if _by_evidence(recipe, budgets):
        yield from _steps_to_measure(recipe)
    else:
        yield from _steps_to_close(recipe)


def _steps_to_measure(recipe: Recipe) -> Iterator[Problem]:
    warmup, steps = recipe.gates.warmup, recipe.training.max_steps
    reason = "what closing gates costs is measured in the second half of the warm-up"
    if warmup == 0:
        yield Problem("gates.warmup", f"given 0, expected above 0 {_beside(recipe)}: {reason}")
    elif steps is not None and round(warmup * steps) < 2:
        yield Problem(
            "gates.warmup",
            f"given {warmup:g} of training.max_steps={steps}, expected at least 2 steps {_beside(recipe)}: {reason}",
        )


def _steps_to_close(recipe: Recipe) -> Iterator[Problem]:
    gates, steps = recipe.gates, recipe.training.max_steps
    reason = f"{_beside(recipe)}: gates close between the warm-up and the fixed phase"
    for name, share in (("warmup", gates.warmup), ("fixed", gates.fixed)):
        if share == 1:
            yield Problem(f"gates.{name}", f"given 1, expected below 1 {reason}")
            return
    if steps is not None and steps - round(gates.fixed * steps) - round(gates.warmup * steps) < 1:
        yield Problem(
            "gates.fixed",
            f"given {gates.fixed:g} after a warm-up of {gates.warmup:g} of training.max_steps={steps}, expected at "
            f"least a step between them {reason}",
        )


def _by_evidence(recipe: Recipe, budgets: Sequence[Budget]) -> bool:
    chosen = recipe.gates.allocation
    return chosen == "evidence" or (chosen is None and not _limits_ranks(budgets))


def _limits_ranks(budgets: Sequence[Budget]) -> bool:
    return any(budget.quantity is Quantity.RANK for budget in budgets)


def _learns_ranks(recipe: Recipe) -> bool:
    return recipe.adapter.learn_rank and recipe.adapter.r > 1


def _beside(recipe: Recipe) -> str:
    return f"with gates.budget={recipe.gates.budget!r}"


def _names(quantities: Sequence[Quantity]) -> str:
    return " and ".join(dict.fromkeys(quantity.value for quantity in quantities))
