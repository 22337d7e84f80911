"""Which quantizers a recipe asks for, and what it asks of grids that have no tensor to lie on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from rankbits.accounting.spec import Method
from rankbits.recipes.counted import own_sites
from rankbits.recipes.problems import Problem, shown
from rankbits.recipes.schema import AdapterSection, Recipe

MERGED_SITES = ("weight", "output", "input")
"""Where a layer can have a quantizer if its update lies within the weight."""


def learned_sites(adapter: AdapterSection) -> tuple[str, ...]:
    """The sites of each adapted layer that have a quantizer with Bayesian-LoRA."""
    return own_sites(Method.BAYESIAN_LORA, adapter) if adapter.learn_bits else ()


def quantizers_as_said(adapter: AdapterSection) -> str:
    """The setting that decides which quantizers there are, as key=value."""
    if not adapter.learn_bits:
        return "adapter.learn_bits=false"
    return "adapter.quantizers=" + ("null" if adapter.quantizers is None else shown(adapter.quantizers))


def misplaced(recipe: Recipe) -> Iterator[Problem]:
    """What an adapter with learned widths would refuse of a recipe, whatever its model: problems with keys."""
    checks = (_beside_a_merged_weight, _codes, _inputs)
    yield from chain.from_iterable(check(recipe.adapter) for check in checks)


def _beside_a_merged_weight(adapter: AdapterSection) -> Iterator[Problem]:
    wanted = adapter.quantizers or []
    if adapter.placement == "merged" and not set(MERGED_SITES).issuperset(wanted):
        yield Problem(
            "adapter.quantizers",
            f"given {shown(wanted)}, expected weight, output and input alone with adapter.placement=merged, which "
            "leaves nothing beside the weight",
        )


def _codes(adapter: AdapterSection) -> Iterator[Problem]:
    if adapter.rounding == "compensated" and "weight" not in learned_sites(adapter):
        yield Problem(
            "adapter.rounding",
            f"given the text 'compensated', expected nearest with {quantizers_as_said(adapter)}: the weight has no "
            "quantizer",
        )


def _inputs(adapter: AdapterSection) -> Iterator[Problem]:
    if adapter.input_granularity == "group" != adapter.granularity:
        yield Problem(
            "adapter.input_granularity",
            f"given the text 'group', expected tensor with adapter.granularity={adapter.granularity}: inputs share the "
            "groups of the weight",
        )
        return
    # The layers of a quantized head read on these grids, too.
    if not adapter.learn_bits or adapter.quantize_head or "input" in learned_sites(adapter):
        return
    choices = (("activation_ranges", "affine", "largest or fitted"), ("input_granularity", "group", "tensor"))
    for name, given, expected in choices:
        if getattr(adapter, name) == given:
            yield Problem(
                f"adapter.{name}",
                f"given the text {given!r}, expected {expected} with {quantizers_as_said(adapter)}: no input has a "
                "quantizer",
            )
