"""A tiny random BERT with a tokenizer of single bytes, saved as a folder that a recipe can name."""

from pathlib import Path

import torch
from tiny_decoder import byte_tokenizer
from transformers import BertConfig, BertModel


def save_tiny_encoder(folder: Path) -> str:
    """Two layers of width 32; 64 positions."""
    tokenizer = byte_tokenizer(padding="<|pad|>")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
