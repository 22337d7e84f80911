"""A base in 4-bit NormalFloat: which recipes want one, what of it stays wide, and which optimizer pages."""

from __future__ import annotations

import re
from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig

from rankbits.errors import ModelError
from rankbits.recipes.catalogue import method
from rankbits.recipes.schema import Recipe

INSTALL = "pip install 'rankbits[quantized]'"
HEADS = ("classifier", "score", "classification_head", "lm_head", "embed_out")
"""Heads are fresh or tied to the word list: they are not in 4 bits."""
PAGED_OPTIMIZER = "paged_adamw_32bit"
"""AdamW whose states the driver moves to the host's memory where the accelerator's is full (Dettmers et al. 2023)."""


def quantization(recipe: Recipe) -> BitsAndBytesConfig | None:
    """How the recipe's base is held in 4 bits, or None if its method takes it as it is (Dettmers et al. 2023).

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if not method(recipe.method).four_bit:
        return None
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"method: {recipe.method} holds the base in 4 bits, for which the package bitsandbytes is needed; install "
            f"it with: {INSTALL}"
        )
    settings = recipe.adapter.nf4
    usual = "bfloat16" if recipe.training.precision == "bf16" else "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=getattr(torch, settings.compute_dtype or usual),
        llm_int8_skip_modules=[f".*{re.escape(name)}" for name in (*HEADS, *(recipe.adapter.modules_to_save or ()))],
    )


def optimizer(recipe: Recipe) -> tuple[str | None, str]:
    """The optimizer that a method with a 4-bit base asks for, or None for the usual one, and what to say of it."""
    if not method(recipe.method).four_bit:
        return None, ""
    if torch.cuda.is_available():
        return PAGED_OPTIMIZER, ""
    return None, "optimizer: paged states exist on CUDA alone; here AdamW keeps its states in ordinary memory"
