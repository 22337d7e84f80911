"""What a recipe's settings come to in one model: the same numbers for adapters that are attached and for estimates."""

from __future__ import annotations

from rankbits.recipes.schema import Recipe


def sbora_variant(recipe: Recipe) -> str:
    """The matrix that SBoRA fixes: what the method's name says, else the setting, else fa."""
    named = {"sbora-fa": "fa", "sbora-fb": "fb"}
    return named.get(recipe.method) or recipe.adapter.sbora.variant or "fa"


def initial_rank(recipe: Recipe) -> int:
    """The rank that every layer is given: AdaLoRA's at the start, half as much again if none is said."""
    r, given = recipe.adapter.r, recipe.adapter.adalora.initial_rank
    if recipe.method != "adalora":
        return r
    # Zhang et al. 2023, section 4: the initial budget is 1.5 times the final one.
    return round(1.5 * r) if given is None else given


def bottleneck_width(recipe: Recipe, hidden: int) -> int | None:
    """Width of a bottleneck in a model of this hidden size; None is the method's usual one."""
    settings = recipe.adapter.bottleneck
    if settings.reduction_factor is None:
        return settings.size
    return max(1, int(hidden / settings.reduction_factor))


def virtual_tokens(recipe: Recipe) -> int:
    """Tokens or keys that the method puts before those of a row."""
    lengths = {"prefix": recipe.adapter.prefix.virtual_tokens, "prompt": recipe.adapter.prompt.virtual_tokens}
    return lengths.get(recipe.method, 0)
