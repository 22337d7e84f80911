"""The methods that are PEFT's own, as a recipe attaches them to the tiny models of `every_method`."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import torch
from every_method import TARGETS, base
from peft import PeftConfig, PeftModel, TaskType
from torch import Tensor

from rankbits import tasks
from rankbits.recipes import four_bits, methods, models
from rankbits.recipes.load import load
from rankbits.recipes.schema import Recipe

ON_WEIGHTS = ("lora", "rslora", "dora", "adalora")
"""Low-rank updates of the weights of linear layers."""
ON_FOUR_BITS = ("qlora", "qdora")
"""The same, beside weights in 4 bits."""
ON_TOKENS = ("prefix", "prompt")
"""Virtual tokens before those of a row."""
RANK, ALPHA, INITIAL_RANK, VIRTUAL = 3, 7, 5, 4
"""Rank and alpha, the rank that AdaLoRA starts with, and virtual tokens."""
TASK_TYPES = {"encoder": TaskType.SEQ_CLS, "decoder": TaskType.CAUSAL_LM}


@cache
def recipe_of(kind: str, method: str, dtype: torch.dtype = torch.float32) -> Recipe:
    """A recipe of the method, with sizes for a tiny model and no dropout; weights in 4 bits compute in the dtype."""
    settings = {
        "r": RANK,
        "alpha": ALPHA,
        "dropout": 0,
        "targets": f"[{','.join(TARGETS[kind])}]",
        "adalora.initial_rank": INITIAL_RANK,
        "prefix.virtual_tokens": VIRTUAL,
        "prompt.virtual_tokens": VIRTUAL,
        "nf4.compute_dtype": "bfloat16" if dtype == torch.bfloat16 else "float32",
    }
    return load("quickstart", [f"method={method}", *(f"adapter.{key}={value}" for key, value in settings.items())])


def bare(kind: str, method: str, dtype: torch.dtype = torch.float32) -> Any:
    """The base that a method is given, the same whenever it is made: in the dtype, or in 4 bits."""
    made: Any = base(kind)
    for parameter in made.parameters():
        if parameter.dim() == 2:
            # Weights of transformers' start are so small that a block hardly adds to what passes by it.
            parameter.data *= 8
    if method not in ON_FOUR_BITS:
        return made.to(dtype)
    quantization = four_bits.quantization(recipe_of(kind, method, dtype))
    with TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        if kind == "encoder":
            return models.load_classifier(folder, tasks.get("mnli"), quantization).eval()
        return models.load_language_model(folder, quantization).eval()


def attached(kind: str, method: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A tiny model with one adapter as a recipe attaches it, the same whenever it is made."""
    made = bare(kind, method, dtype)
    torch.manual_seed(4)
    model = methods.attach(recipe_of(kind, method, dtype), made, TASK_TYPES[kind])
    assert isinstance(model, PeftModel)
    return model.eval()


def config_of(kind: str, method: str, model: PeftModel) -> PeftConfig:
    """What a second adapter of the method is added with."""
    config = methods.METHODS[method].config(recipe_of(kind, method), model.get_base_model())
    config.task_type = TASK_TYPES[kind]
    return config


def stirred(model: PeftModel, seed: int = 6, *, head: bool = True) -> PeftModel:
    """Move all that trains away from its start, so that no factor is zero; the head too unless it is to stay."""
    noise = torch.Generator().manual_seed(seed)
    # By name: casting an adapter changes the order in which its parameters are listed.
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad and (head or "modules_to_save" not in name):
            drawn = torch.randn(parameter.shape, generator=noise)
            parameter.data += 0.3 * drawn.to(parameter.dtype)
    return model


def padded_batch(kind: str) -> dict[str, Tensor]:
    """Four rows with labels, of which two end in padding; for an encoder with types of tokens."""
    chosen = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 30, (4, 6), generator=chosen)
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[3, 2:] = 0
    rows = {"input_ids": ids, "attention_mask": mask}
    if kind == "decoder":
        return rows | {"labels": ids.masked_fill(mask == 0, -100)}
    types = torch.randint(0, 2, ids.shape, generator=chosen)
    return rows | {"token_type_ids": types, "labels": torch.tensor([0, 1, 2, 0])}
