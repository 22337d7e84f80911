"""The method of a recipe as accounting counts it: the same sizes as the adapters that its run attaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rankbits.accounting.architectures.read import Head
from rankbits.accounting.params import targeted
from rankbits.accounting.settings import Base
from rankbits.accounting.spec import Granularity, Method, MethodSpec, ModelShape, MoraForm, Placement
from rankbits.accounting.trained import above_body
from rankbits.recipes.catalogue import method as described
from rankbits.recipes.schema import QUANTIZER_SITES, AdapterSection, Recipe
from rankbits.recipes.sizes import bottleneck_width, initial_rank, sbora_variant, virtual_tokens

if TYPE_CHECKING:
    from rankbits.recipes.question import Keys

CLASSIFIERS = ("classifier", "score")
"""Heads that PEFT trains in full, without being told, when it adapts a classifier of sequences."""
WITHOUT_ADAPTERS = frozenset({Method.FULL, Method.TOP_LAYER, Method.FEATURE_BASED})


def spec_of(recipe: Recipe, shape: ModelShape, head: Head) -> MethodSpec:
    """What a recipe's method adds to a model.

    Args:
        recipe: its method and its adapter section are read.
        shape: the model.
        head: what its task puts on it.
    """
    adapter, method = recipe.adapter, method_of(recipe)
    spec = MethodSpec(
        method,
        rank=initial_rank(recipe),
        targets=targets_of(adapter.targets),
        sites=own_sites(method, adapter) if adapter.learn_bits else (),
        learn_rank=adapter.learn_rank,
        **grids_of(adapter),
        mora=MoraForm(adapter.mora.type, adapter.mora.rounding == "floor", adapter.mora.fold),
        width=bottleneck_width(recipe, shape.hidden),
        trained_in_full=in_full_with(method, shape, adapter.modules_to_save or (), head),
        layers=adapter.top_layer.layers if method is Method.TOP_LAYER else 0,
    )
    if method is Method.ADALORA:
        return replace(spec, ranks={linear.name: adapter.r for linear in targeted(shape, spec)})
    if method in {Method.PREFIX, Method.PROMPT}:
        return replace(spec, virtual_tokens=virtual_tokens(recipe))
    used = adapter.dylora.evaluation_rank
    if method is Method.DYLORA and used is not None:
        return replace(spec, ranks={linear.name: used for linear in targeted(shape, spec)})
    return spec


def method_of(recipe: Recipe) -> Method:
    """The member of the family that a recipe names; qsbora and multi-sbora are two of them, by what they fix."""
    families = {"qsbora": "qsbora", "multi-sbora": "sbora"}
    family = families.get(recipe.method)
    return Method(f"{family}-{sbora_variant(recipe)}" if family else recipe.method)


def base_of(recipe: Recipe) -> Base:
    """How the base is held: in full width, or in 4 bits."""
    if not described(recipe.method).four_bit:
        return "fp32"
    return "nf4-double" if recipe.adapter.nf4.double_quantization else "nf4"


def targets_of(targets: list[str] | str | None) -> tuple[str, ...] | str | None:
    """Targets as accounting takes them."""
    return tuple(targets) if isinstance(targets, list) else targets


def own_sites(method: Method, settings: Keys | AdapterSection) -> tuple[str, ...]:
    """Sites that have a quantizer: those that were asked for, or the usual ones of the placement."""
    if method is not Method.BAYESIAN_LORA:
        return ()
    usual = ("weight", "input") if settings.placement == "merged" else QUANTIZER_SITES[:-1]
    wanted = usual if settings.quantizers is None else settings.quantizers
    return tuple(site for site in QUANTIZER_SITES if site in wanted)


def grids_of(settings: Keys | AdapterSection) -> dict[str, Any]:
    """Where the grids of Bayesian-LoRA lie and what shares them, as fields of a method."""
    return {
        "placement": Placement(settings.placement),
        "compensated": settings.rounding == "compensated",
        "all_codes": settings.code_range == "full",
        "scale_bits": settings.scale_bits,
        "granularity": Granularity(settings.granularity),
        "input_granularity": Granularity(settings.input_granularity),
        "affine_inputs": settings.activation_ranges == "affine",
        "group_size": settings.group_size,
        "share_inputs": settings.share_inputs,
        "tie_groups": settings.tie_groups is not None,
        "quantize_attention": settings.quantize_attention,
        "quantize_head": settings.quantize_head,
    }


def in_full_with(method: Method, shape: ModelShape, wanted: Sequence[str], head: Head) -> tuple[str, ...]:
    """Modules trained in full: PEFT's and, without adapters, those that the method means with those asked for."""
    if method not in WITHOUT_ADAPTERS:
        return in_full(shape, wanted, head)
    return (*above_body(shape), *in_full(shape, wanted, Head.NONE)) if wanted else ()


def in_full(shape: ModelShape, wanted: Sequence[str], head: Head) -> tuple[str, ...]:
    """Names of modules that PEFT trains in full: those asked for and a classifier, wherever a module's name ends so.

    PEFT compares ends of names and not whole ones: "classifier" is DistilBERT's pre_classifier too.
    """
    names = dict.fromkeys(name for part in shape.parts for name in part.name.split("."))
    # What was asked for and is not there stays, to be refused where it is counted; a head was not asked for.
    found = {end: [name for name in names if name.endswith(end)] or [end] for end in wanted}
    if head is Head.CLASSIFICATION:
        found |= {end: [name for name in names if name.endswith(end)] for end in CLASSIFIERS}
    return tuple(dict.fromkeys(name for matching in found.values() for name in matching))
