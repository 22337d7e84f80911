"""Two tiny decoders built from their configs into a temporary folder: what PEFT's tests load instead of hub models."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

# An upstream check that is always false skips the merge tests of models with these words in their path.
SHUNNED = ("llama", "gemma3")
VOCABULARY, HIDDEN, LAYERS, HEADS = 128, 64, 2, 4
_FOLDER = tempfile.TemporaryDirectory(prefix="conformance-")


def _save(model: PreTrainedModel, name: str) -> str:
    path = Path(_FOLDER.name) / name
    if any(word in str(path).lower() for word in SHUNNED):
        raise ValueError(f"{path} holds one of {SHUNNED}: PEFT's merge tests would be skipped")
    model.save_pretrained(path)
    return str(path)


@functools.cache
def gated() -> str:
    """Folder of a Llama-type decoder: no biases, two key/value heads for four query heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return _save(LlamaForCausalLM(config), "gated")


@functools.cache
def opt() -> str:
    """Folder of an OPT-type decoder: biases, tied embeddings."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
    )
    return _save(OPTForCausalLM(config), "opt")
