"""How the adapter of one layer starts: its rank, its weights and its quantizers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankbits.quant.fixed_quantizer import FixedQuantizer
from rankbits.quant.grid import Signedness
from rankbits.quant.quantizer import Quantizer
from rankbits.tuners.bayesian_lora.config import ACTIVATION_SITES, BayesianLoraConfig, Site, Start

DIAGONAL_HEADROOM = 1.5
"""With this range over max|E| a constant E lies on the grid at every width, where a range at max|E| would not."""
WEIGHT_STANDARD_DEVIATION = 0.02
PLAIN_PRODUCTS = ("FalconLinear",)
"""Linear layers with a forward of their own that is the product with the weight, and the bias, all the same."""
SIGNEDNESS = {Site.INPUT: Signedness.AUTO, Site.PROBABILITIES: Signedness.UNSIGNED}
"""Sides of zero that a grid covers where these are not both."""


def rank_of(config: BayesianLoraConfig, key: str, shape: tuple[int, int]) -> int:
    """Rank that a layer's update starts with.

    Args:
        config: of the adapter.
        key: qualified name of the layer.
        shape: (out_features, in_features).

    Raises:
        ValueError: r exceeds what the matrix can have, or a hardened configuration does not know this layer.
    """
    if config.hardened_ranks is not None:
        if key not in config.hardened_ranks:
            raise ValueError(
                f"this adapter was hardened for the layers {sorted(config.hardened_ranks)}, not for {key!r}: "
                "load it onto the base model it was trained on"
            )
        return config.hardened_ranks[key]
    if config.r > min(shape):
        raise ValueError(
            f"`r`={config.r} exceeds the rank that {key!r} can have: its weight is {list(shape)}, so r <= {min(shape)}"
        )
    return config.r


@torch.no_grad()
def start_weights(down: Tensor, diagonal: Tensor, up: Tensor, start: Start) -> None:
    """Fill A [r, in_features], E [r] and B [out_features, r] in place; the update is zero unless random."""
    if start is Start.ADALORA:
        nn.init.normal_(down, std=WEIGHT_STANDARD_DEVIATION)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    if start is Start.LORA:
        nn.init.zeros_(up)
    else:
        nn.init.normal_(up, std=WEIGHT_STANDARD_DEVIATION)
    nn.init.constant_(diagonal, 0.0 if start is Start.ADALORA else 1.0)


def learning_quantizer(
    site: Site, config: BayesianLoraConfig, shape: tuple[int, int], key: str, *, compensated: bool = False
) -> Quantizer:
    """A quantizer that has yet to learn its range; ValueError if groups do not divide the rows of the weight."""
    try:
        quantizer = Quantizer(
            calibration_passes=config.calibration_passes,
            signedness=_signedness(site, config),
            headroom=DIAGONAL_HEADROOM if site is Site.DIAGONAL else 1.0,
            layout=config.layout_of(site),
            shape=_quantized_shape(site, shape),
            compensated=compensated and site is Site.WEIGHT,
            full=config.uses_all_codes and site is Site.WEIGHT,
        )
    except ValueError as reason:
        raise ValueError(
            f"{key!r}: {reason}; {without_groups(config)}, or leave the layer out with exclude_modules"
        ) from reason
    quantizer.fits_passes = config.fits_activations and site in ACTIVATION_SITES
    return quantizer


def check_quantizable(base: nn.Module, weight: Tensor, key: str) -> None:
    """Refuse a layer whose weight no quantizer can stand in for.

    Args:
        base: the layer, whose product is computed with the rounded weight instead.
        weight: its weight.
        key: qualified name of the layer.

    Raises:
        TypeError: the layer may do more than multiply by its weight.
        ValueError: the weight holds NaN or infinite values.
    """
    plain = Conv1D if isinstance(base, Conv1D) else nn.Linear
    if type(base).forward is not plain.forward and type(base).__name__ not in PLAIN_PRODUCTS:
        raise TypeError(
            f"target module {key!r} is a {type(base).__module__}.{type(base).__qualname__} with a forward of its own, "
            "which a quantizer of its weight would bypass: expected torch.nn.Linear or transformers' Conv1D as they "
            "are, or quantizers without 'weight' and placement='separate'"
        )
    broken = 0 if weight.is_meta else weight.numel() - int(torch.isfinite(weight).sum())
    if broken:
        raise ValueError(
            f"{key!r}: {broken} of its {weight.numel()} weights are NaN or infinite, which no grid holds: load the "
            "base model again, or leave the layer out with exclude_modules"
        )


def without_groups(config: BayesianLoraConfig) -> str:
    """What to set where groups do not divide a row."""
    inputs = " with input_granularity='tensor'" if config.input_granularity == "group" else ""
    return f"choose another `group_size`, or granularity='channel'{inputs}"


def _signedness(site: Site, config: BayesianLoraConfig) -> Signedness:
    if site is Site.INPUT and config.has_affine_inputs:
        return Signedness.AFFINE
    return SIGNEDNESS.get(site, Signedness.SIGNED)


def _quantized_shape(site: Site, shape: tuple[int, int]) -> tuple[int, ...]:
    """Of what the quantizer at a site of a layer with this weight has ranges for: what is read has one row of them."""
    return shape[1:] if site is Site.INPUT else shape


def fixed_quantizers(
    config: BayesianLoraConfig, key: str, shape: tuple[int, int], *, compensated: bool = False
) -> nn.ModuleDict:
    """The quantizers that a hardened configuration names for a layer."""
    unsigned = key in (config.unsigned_inputs or ())
    quantizers = {}
    for site, width in (config.hardened_bits or {}).get(key, {}).items():
        signed = site != Site.PROBABILITIES.value and not (unsigned and site == Site.INPUT.value)
        of_weight = site == Site.WEIGHT.value
        quantizers[site] = FixedQuantizer(
            width,
            signed=signed,
            layout=config.layout_of(Site(site)),
            shape=_quantized_shape(Site(site), shape),
            compensated=compensated and of_weight,
            full=config.uses_all_codes and of_weight,
            affine=config.has_affine_inputs and site == Site.INPUT.value,
        )
    return nn.ModuleDict(quantizers)
