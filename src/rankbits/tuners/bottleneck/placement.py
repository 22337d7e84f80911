"""Where the sub-layers of known architectures end, what enters their feed-forward, and where their norms stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Paths of the parts of one transformer block, inside the block.

    Args:
        attention_output: the linear layer that ends self-attention.
        output: the linear layer that ends the feed-forward.
        input: a linear layer that reads the input of the feed-forward.
        norm_before: the norm that the residual enters on its way to the feed-forward; "" where there is none.
        norm_after: the norm whose input is the sum of feed-forward and residual; "" where there is none.
        norms: endings of the names of all norms of a block.
        not_output: longer paths that end as `output` does and are not the feed-forward's.
        not_attention: longer paths that end as `attention_output` or `output` does and belong to cross-attention.
    """

    attention_output: str
    output: str
    input: str
    norm_before: str = ""
    norm_after: str = ""
    norms: tuple[str, ...] = ()
    not_output: frozenset[str] = field(default_factory=frozenset)
    not_attention: frozenset[str] = field(default_factory=frozenset)

    @property
    def feed_forward(self) -> dict[str, str]:
        """The paths that `BottleneckConfig.feed_forward` takes."""
        paths = {"output": self.output, "input": self.input}
        norms = {"norm_before": self.norm_before, "norm_after": self.norm_after}
        return paths | {key: path for key, path in norms.items() if path}


BERT = Layout(
    "attention.output.dense",
    "output.dense",
    "intermediate.dense",
    norm_after="output.LayerNorm",
    norms=("output.LayerNorm",),
    not_output=frozenset({"attention.output.dense"}),
    not_attention=frozenset({"crossattention.output.dense"}),
)
LLAMA = Layout(
    "self_attn.o_proj",
    "mlp.down_proj",
    "mlp.gate_proj",
    norm_before="post_attention_layernorm",
    norms=("input_layernorm", "post_attention_layernorm"),
)
# Attention and feed-forward of Phi read the same norm, so the residual enters it for both.
PHI = Layout("self_attn.dense", "mlp.fc2", "mlp.fc1", norm_before="input_layernorm", norms=("input_layernorm",))
DISTILBERT = Layout(
    "attention.out_lin",
    "ffn.lin2",
    "ffn.lin1",
    norm_after="output_layer_norm",
    norms=("sa_layer_norm", "output_layer_norm"),
)
GPT2 = Layout("attn.c_proj", "mlp.c_proj", "mlp.c_fc", norm_before="ln_2", norms=("ln_1", "ln_2"))
BART = Layout(
    "self_attn.out_proj",
    "fc2",
    "fc1",
    norm_after="final_layer_norm",
    norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
)
OPT_NORMS = ("self_attn_layer_norm", "final_layer_norm")
OPT_BEFORE = Layout("self_attn.out_proj", "fc2", "fc1", norm_before="final_layer_norm", norms=OPT_NORMS)
OPT_AFTER = Layout("self_attn.out_proj", "fc2", "fc1", norm_after="final_layer_norm", norms=OPT_NORMS)

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "deberta-v2"), BERT),
    **dict.fromkeys(("llama", "qwen2", "mistral", "gemma"), LLAMA),
    "distilbert": DISTILBERT,
    "phi": PHI,
    "gpt2": GPT2,
    "bart": BART,
}
"""Layouts by model_type; those that depend on the rest of the config are in `layout_of`."""
KNOWN = tuple(sorted({*LAYOUTS, "opt", "t5", "mt5"}))


def layout_of(model_config: Mapping[str, Any]) -> Layout | None:
    """The layout of the blocks of a model, or None if its architecture is not known.

    Args:
        model_config: the transformers config as a dictionary.
    """
    kind = model_config.get("model_type")
    if kind == "opt":
        return OPT_BEFORE if model_config.get("do_layer_norm_before", True) else OPT_AFTER
    if kind in {"t5", "mt5"}:
        gated = str(model_config.get("feed_forward_proj", "relu")).startswith("gated")
        # A block of T5 is a list of sub-layers, and its paths are those inside one sub-layer.
        return Layout(
            "SelfAttention.o",
            "DenseReluDense.wo",
            "DenseReluDense.wi_0" if gated else "DenseReluDense.wi",
            norm_before="layer_norm",
            norms=("0.layer_norm", "1.layer_norm", "2.layer_norm"),
        )
    return LAYOUTS.get(str(kind))
