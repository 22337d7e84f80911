"""A small Llama that reads hexadecimal digits in pairs, untrained, as a folder that a recipe can name."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, PADDING, BETWEEN = "<end>", "<padding>", ":"
WIDTH, LAYERS, HEADS, FEED_FORWARD = 128, 2, 4, 256


def digit_tokenizer() -> PreTrainedTokenizerFast:
    """One token for two digits, which halves the length of a UUID, and one for what stands between key and value."""
    words = [*(f"{byte:02x}" for byte in range(256)), BETWEEN, END, PADDING]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=PADDING))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"[0-9a-f]{{2}}|{BETWEEN}"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING)


def save_untrained(folder: Path, seed: int) -> None:
    """Draw the weights and save them with the tokenizer."""
    tokenizer = digit_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
