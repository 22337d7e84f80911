"""LoRA merged, then rounded after training: what a user would do otherwise, by our arithmetic and by torchao's."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from points import TARGETS
from rounding import Fit, Scales, Scheme, grouped, largest_code, rounded_layers, rounded_weight, scale_count, watching
from rows import Rows, batches, load_rows, score, tokenized, tokenizer_of
from torch import nn

from rankbits import tasks
from rankbits.recipes import facts, models
from rankbits.recipes.run_folder import work_of
from rankbits.recipes.schema import Recipe
from rankbits.records import recipe_hash

CALIBRATION_ROWS = 640
FLOAT_BITS = 32
SCHEMES = (
    *(Scheme(8, 8, scales) for scales in Scales),
    *(Scheme(4, 8, scales, fit=fit) for scales in Scales for fit in Fit),
    *(Scheme(3, 8, scales, fit=fit) for scales in (Scales.CHANNEL, Scales.GROUP) for fit in Fit),
    *(Scheme(2, 8, Scales.GROUP, group_size=size, fit=fit) for size in (64, 32) for fit in Fit),
    *(Scheme(4, 4, Scales.GROUP, fit=fit) for fit in Fit),
    *(
        Scheme(bits, 8, Scales.GROUP, group_size=size, fit=Fit.ALL_CODES, scale_bits=8)
        for bits, size in ((4, 16), (3, 8), (2, 8))
    ),
)
"""The last three have the grids of weights that our points of equal cost have, and one range for each input."""


def by_our_arithmetic(recipe: Recipe, adapter: Path) -> dict[str, Any]:
    """Scores of all schemes, with static ranges of activations: the better of maximum and 99.9th percentile.

    Which of the two is decided for each scheme on the development slice of the training rows; LoRA was trained on them,
    validation is not read for it.
    """
    task, tokenizer = tasks.get(recipe.task.name), tokenizer_of(recipe)
    length = recipe.task.max_length
    rows = load_rows(recipe)
    validation = tokenized(next(iter(rows.evaluation.values())), task, tokenizer, length)
    slice_ = next(iter(load_rows(recipe, development=True).evaluation.values()))
    development = tokenized(slice_, task, tokenizer, length)
    model = merged(recipe, adapter)
    layers = targets_of(model)
    ranges = _ranges(model, layers, tokenized(rows.train, task, tokenizer, length), tokenizer)
    results = []
    for scheme in SCHEMES:
        tried = {}
        for rule, given in ranges.items():
            with rounded_layers(layers, given, scheme):
                tried[rule] = score(model, development, task, tokenizer)[task.primary_metric]
        rule = max(tried, key=lambda name: tried[name])
        with rounded_layers(layers, ranges[rule], scheme):
            scores = score(model, validation, task, tokenizer)
        print(scheme.name, rule, scores, flush=True)
        results.append(
            {"scheme": scheme.name, "input_range": rule, "development": tried, "scores": scores, **cost(layers, scheme)}
        )
    unrounded = score(model, validation, task, tokenizer)
    return {**_facts(recipe), "unrounded": unrounded, "schemes": results}


def merged(recipe: Recipe, adapter: Path) -> nn.Module:
    """The base model with LoRA's update in its weights, in float32."""
    base = models.load_classifier(recipe.model, tasks.get(recipe.task.name))
    model = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    model.eval()
    return model  # type: ignore[no-any-return]


def targets_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that LoRA adapted."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(TARGETS, n)}


def cost(layers: dict[str, nn.Linear], scheme: Scheme) -> dict[str, float]:
    """Bit operations and bytes of the rounded layers as shares of their 32-bit ones."""
    weights = [layer.weight.shape for layer in layers.values()]
    elements = sum(rows * columns for rows, columns in weights)
    scales = sum(scale_count((rows, columns), scheme) for rows, columns in weights)
    return {
        "bops_share": scheme.weight_bits * scheme.input_bits / FLOAT_BITS**2,
        "bytes_share": (elements * scheme.weight_bits + scales * scheme.scale_bits) / (elements * FLOAT_BITS),
    }


@torch.inference_mode()
def _ranges(model: nn.Module, layers: dict[str, nn.Linear], rows: Rows, tokenizer: Any) -> dict[str, dict[str, float]]:
    order = list(range(min(CALIBRATION_ROWS, len(rows.encoded))))
    with watching(layers) as seen:
        for batch, _ in batches(rows, tokenizer, order, size=32):
            model(**batch)
    return {
        "maximum": {name: values.maximum for name, values in seen.items()},
        "percentile": {name: values.percentile for name, values in seen.items()},
    }


def _facts(recipe: Recipe) -> dict[str, Any]:
    return {
        "task": recipe.task.name,
        "seed": recipe.training.seed,
        "source_recipe_hash": recipe_hash(work_of(recipe)),
        "versions": facts.versions(),
        "machine": facts.machine(),
    }


def by_torchao(recipe: Recipe, adapter: Path) -> dict[str, Any]:
    """Scores of what torchao makes of the merged model: 8-bit inputs rounded afresh per token, weights in 8, 4, 3 or 2.

    It also rounds the same weights with torchao's own primitives and compares them with ours.
    """
    import torchao  # type: ignore[import-not-found]

    task, tokenizer = tasks.get(recipe.task.name), tokenizer_of(recipe)
    rows = next(iter(load_rows(recipe).evaluation.values()))
    validation = tokenized(rows, task, tokenizer, recipe.task.max_length)
    model = merged(recipe, adapter)
    results = []
    for name, quantized in _quantized(model):
        scores = score(quantized, validation, task, tokenizer)
        print(name, scores, flush=True)
        results.append({"scheme": name, "scores": scores})
    apart = {scheme.name: _apart(targets_of(model), scheme) for scheme in SCHEMES if scheme.fit is Fit.MAXIMUM}
    found = _facts(recipe)
    found["versions"]["torchao"] = torchao.__version__
    return {**found, "schemes": results, "apart_from_our_arithmetic": apart}


def _quantized(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from torchao.quantization import (  # type: ignore[import-not-found]
        Int8DynamicActivationIntxWeightConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerAxis, PerGroup  # type: ignore[import-not-found]

    for bits in (8, 4, 3, 2):
        for name, granularity in (("channel", PerAxis(0)), ("group64", PerGroup(64))):
            config = Int8DynamicActivationIntxWeightConfig(
                weight_dtype=getattr(torch, f"int{bits}"), weight_granularity=granularity
            )
            copied = copy.deepcopy(model)
            names = set(targets_of(copied))
            quantize_(copied, config, filter_fn=lambda _module, name, names=names: name in names)
            yield f"w{bits}a8-{name}-torchao", copied


def _apart(layers: dict[str, nn.Linear], scheme: Scheme) -> dict[str, float]:
    """How far torchao's rounded weights are from ours: the largest distance in steps, and the share that differ.

    It multiplies by the reciprocal of a scale where we divide, so that a value between two codes may go either way.
    """
    from torchao.quantization.quant_primitives import (  # type: ignore[import-not-found]
        dequantize_affine,
        quantize_affine,
    )

    bound = largest_code(scheme.weight_bits)
    worst, differing, count = 0.0, 0, 0
    for layer in layers.values():
        view = grouped(layer.weight.data, scheme)
        scale = view.abs().amax(dim=1) / bound
        zero = torch.zeros_like(scale, dtype=torch.int32)
        block = (1, view.shape[1])
        codes = quantize_affine(view, block, scale, zero, torch.int8, -bound, bound)
        theirs = dequantize_affine(codes, block, scale, zero, torch.int8, -bound, bound)
        ours = grouped(rounded_weight(layer.weight.data, scheme), scheme)
        steps = (theirs - ours).abs() / scale[:, None]  # [scales, elements]
        worst, differing, count = (
            max(worst, float(steps.max())),
            differing + int((steps > 0.5).sum()),
            count + steps.numel(),
        )
    return {"largest_steps": worst, "share": differing / count}
