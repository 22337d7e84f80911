"""A tiny random Llama with a tokenizer of single bytes, saved as a folder that a recipe can name."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"


def byte_tokenizer(*, end: str | None = END, padding: str | None = None) -> PreTrainedTokenizerFast:
    """One token for every byte and, if wanted, one that ends a text and one that pads."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {name: token for name, token in (("eos_token", end), ("pad_token", padding)) if token}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_tiny_decoder(folder: Path) -> str:
    """Two layers of width 32 with two key heads for four query heads, whose head is the word list as in SmolLM2."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.5,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
