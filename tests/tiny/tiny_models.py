"""Small configs of every architecture that is read, and the live models that transformers builds from them."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from rankbits.accounting.architectures import encoders, two_stacks
from rankbits.accounting.architectures.read import Head, read_shape
from rankbits.accounting.spec import ModelShape

LABELS = 3
END = 1
"""The id of the token that ends a source, where a classifier of two stacks reads."""


def sizes(*, hidden: int, layers: int, heads: int, wide: int, words: int) -> dict[str, int]:
    """The sizes that nearly every architecture has, under their usual keys."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": wide,
        "vocab_size": words,
    }


BERT: dict[str, Any] = sizes(hidden=24, layers=2, heads=4, wide=40, words=31) | {"max_position_embeddings": 20}
ROBERTA = BERT | {"type_vocab_size": 1, "pad_token_id": 1}
DEBERTA = BERT | {
    "model_type": "deberta-v2",
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
}
ABSOLUTE_DEBERTA = DEBERTA | {
    "relative_attention": False,
    "position_biased_input": True,
    "pos_att_type": None,
    "embedding_size": 10,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": BERT | {"model_type": "bert"},
    "roberta": ROBERTA | {"model_type": "roberta"},
    "xlm-roberta": ROBERTA | {"model_type": "xlm-roberta"},
    "camembert": ROBERTA | {"model_type": "camembert"},
    "distilbert": {
        "model_type": "distilbert",
        "dim": 24,
        "hidden_dim": 40,
        "n_layers": 2,
        "n_heads": 4,
        "vocab_size": 31,
        "max_position_embeddings": 20,
    },
    "deberta-v3": DEBERTA,
    "deberta-v2 with projections for positions": DEBERTA | {"share_att_key": False},
}

LLAMA: dict[str, Any] = sizes(hidden=24, layers=2, heads=6, wide=40, words=96) | {
    "model_type": "llama",
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
QWEN2 = LLAMA | {"model_type": "qwen2"}
MISTRAL = LLAMA | {"model_type": "mistral"}
GEMMA = LLAMA | {"model_type": "gemma", "head_dim": 8}
PHI = LLAMA | {"model_type": "phi", "num_key_value_heads": None}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 96,
    "hidden_size": 24,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 64,
}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama whole heads": LLAMA | {"num_key_value_heads": None},
    "llama tied": LLAMA | {"tie_word_embeddings": True},
    "llama biased": LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 10},
    "qwen2": QWEN2,
    "qwen2 tied": QWEN2 | {"tie_word_embeddings": True},
    "mistral": MISTRAL | {"head_dim": 10},
    "gemma": GEMMA,
    "gemma biased": GEMMA | {"attention_bias": True, "tie_word_embeddings": False},
    "phi": PHI,
    "phi grouped": PHI | {"num_key_value_heads": 3, "tie_word_embeddings": True},
    "opt": OPT,
    "opt projected": OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "opt bare": OPT | {"enable_bias": False, "_remove_final_layer_norm": True, "tie_word_embeddings": False},
    "gpt2": GPT2,
    "gpt2 narrow": GPT2 | {"n_inner": 30, "tie_word_embeddings": False},
}

T5: dict[str, Any] = {
    "model_type": "t5",
    "vocab_size": 96,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
}
MT5 = T5 | {"model_type": "mt5"}
BART: dict[str, Any] = {
    "model_type": "bart",
    "vocab_size": 96,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_layers": 3,
    "decoder_ffn_dim": 30,
    "decoder_attention_heads": 6,
    "max_position_embeddings": 64,
}
TWO_STACKS: dict[str, dict[str, Any]] = {
    "t5": T5,
    "t5 gated": T5 | {"feed_forward_proj": "gated-gelu"},
    "t5 even": T5 | {"num_decoder_layers": None, "relative_attention_num_buckets": None},
    "mt5": MT5,
    "mt5 plain": MT5 | {"feed_forward_proj": "relu"},
    "bart": BART,
    "bart untied": BART | {"tie_word_embeddings": False},
}


def read(values: dict[str, Any], head: Head = Head.NONE) -> ModelShape:
    """The shape of a config that goes by the name "given"."""
    return read_shape(values, name="given", head=head, num_labels=LABELS)


def live(
    values: dict[str, Any],
    head: Head = Head.NONE,
    *,
    device: str = "cpu",
    attention: str = "eager",
    labels: int = LABELS,
) -> Any:
    """The model that transformers builds from a config, with weights in 32 bits, set to evaluate."""
    kind = values["model_type"]
    settings = {key: value for key, value in values.items() if key not in {"_source", "torch_dtype"}}
    language_model: Any = AutoModelForCausalLM
    if kind in two_stacks.READERS:
        language_model = AutoModelForSeq2SeqLM
        # An absent key means the default of transformers, which its config classes refuse to be told as null.
        settings = {key: value for key, value in settings.items() if value is not None}
        settings |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": END}
    elif kind not in encoders.READERS:
        settings["pad_token_id"] = 0
    builders = {
        Head.NONE: AutoModel,
        Head.LANGUAGE_MODEL: language_model,
        Head.CLASSIFICATION: AutoModelForSequenceClassification,
    }
    with torch.device(device):
        config = AutoConfig.for_model(**settings, num_labels=labels)
        return builders[head].from_config(config, attn_implementation=attention).eval()
