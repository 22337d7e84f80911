"""Quantized attention: the operands of both its products on learned grids, by transformers' attention interface.

Attention is P V with P = softmax(s Q K^T + mask) (Vaswani et al. 2017). Here it is Q_p(P) Q_v(V), and P is made of
Q_q(Q) and Q_k(K), each put on its grid where the product reads it: after norms and rotations (Su et al. 2021), behind
which a number that was rounded before would lie on no grid any more. All else is the model's own eager attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from rankbits.tuners.bayesian_lora.config import Operand, Site
from rankbits.tuners.bayesian_lora.layer import BayesianLoraLinear
from rankbits.tuners.bayesian_lora.siblings import PROJECTIONS, projection_names

NAME = "rankbits"
"""Of this attention among transformers' implementations."""
EAGER = "eager_attention_forward"
"""Name of a model's own attention in the file that defines it, wherever it is called through the interface."""

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def register_attention() -> None:
    """Make transformers know this attention, and that it takes the masks of eager attention."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, eager_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own eager attention, with quantized operands where an active adapter has quantizers for them.

    Dropout follows the quantizer: its factor 1 / (1 - p) would leave the range of probabilities.

    Args:
        module: the attention that the model runs; its children make queries, keys and values.
        query: [batch, heads, queries, width].
        key: [batch, key heads, keys, width].
        value: [batch, key heads, keys, width].
        attention_mask: what is added to the scores, [batch, 1, queries, keys], or None.
        dropout: share of probabilities that are dropped, 0 in evaluation.
        kwargs: what the model's own attention takes besides, such as `scaling`.

    Returns:
        [batch, queries, heads, width], and the probabilities [batch, heads, queries, keys] it was made with.
    """
    own, layers = _eager_attention(module), _projections(module)
    adapter = layers[-1].attending_adapter() if layers is not None else None
    if layers is None or adapter is None:
        return own(module, query, key, value, attention_mask, dropout=dropout, **kwargs)
    queries, keys, values = layers
    query = queries.quantize_attended(adapter, Site.OUTPUT, query)
    key = keys.quantize_attended(adapter, Site.OUTPUT, key)
    value = values.quantize_attended(adapter, Site.OUTPUT, value)
    probabilities = _probabilities(own, module, query, key, value, attention_mask, **kwargs)
    probabilities = values.quantize_attended(adapter, Site.PROBABILITIES, probabilities)
    probabilities = F.dropout(probabilities, p=dropout, training=module.training)
    return _weighted(probabilities, value), probabilities


def _probabilities(
    own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """What the model's own attention would multiply the values with, whatever goes into its softmax."""
    # Values of no width make its second product one of nothing.
    nothing = value.new_empty((*value.shape[:-1], 0))
    _, probabilities = own(module, query, key, nothing, *args, dropout=0.0, **kwargs)
    assert probabilities is not None
    return probabilities


def _weighted(probabilities: Tensor, value: Tensor) -> Tensor:
    """P V: [batch, heads, queries, keys] and [batch, key heads, keys, width] to [batch, queries, heads, width]."""
    groups = probabilities.shape[1] // value.shape[1]
    if groups > 1:
        value = value[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)  # [batch, heads, keys, width]
    return torch.matmul(probabilities.to(value.dtype), value).transpose(1, 2).contiguous()


def _projections(block: nn.Module) -> tuple[BayesianLoraLinear, BayesianLoraLinear, BayesianLoraLinear] | None:
    """The layers of queries, keys and values of an attention, if all three have adapters of ours."""
    names = projection_names(block)
    if names is None:
        return None
    queries, keys, values = (getattr(block, name) for name in names)
    if all(isinstance(layer, BayesianLoraLinear) for layer in (queries, keys, values)):
        return queries, keys, values
    return None


def _eager_attention(block: nn.Module) -> Attention:
    """The attention that a block would call by the name "eager"."""
    own: Attention = getattr(sys.modules[type(block).__module__], EAGER)
    return own


def operand_of(parent: nn.Module, key: str, is_target: Callable[[str], bool]) -> Operand | None:
    """What a layer's output is in an attention whose three projections are all adapted; None if it is no such layer.

    Args:
        parent: the module that the layer is a child of.
        key: qualified name of the layer.
        is_target: whether the layer of a qualified name is adapted.
    """
    path, _, own = key.rpartition(".")
    names = projection_names(parent)
    if names is None or own not in names or not all(is_target(f"{path}.{name}".lstrip(".")) for name in names):
        return None
    return dict(zip(names, Operand, strict=True))[own]


def check_attention(model: nn.Module, is_target: Callable[[str], bool]) -> None:
    """Raise ValueError if some attention with adapted projections cannot be quantized, or if there is none.

    Args:
        model: the model, unchanged so far.
        is_target: whether the layer of a qualified name will be adapted.
    """
    kind, found = type(model).__name__, False
    for name, block in model.named_modules():
        names = projection_names(block)
        if names is None or operand_of(block, f"{name}.{names[0]}".lstrip("."), is_target) is None:
            continue
        found = True
        reason = _why_not(block)
        if reason is not None:
            raise ValueError(
                f"`quantize_attention`=True cannot quantize {name!r} ({type(block).__name__}) of {kind}: {reason}; "
                "expected a model whose attention is dispatched through transformers' attention interface, such as "
                "BERT, Llama or T5, or quantize_attention=False"
            )
    if not found:
        known = ", ".join("/".join(names) for names in PROJECTIONS)
        raise ValueError(
            f"`quantize_attention`=True, but no attention of {kind} has its queries, keys and values all adapted: "
            f"expected `target_modules` to match three layers of one block that are named as one of {known}"
        )


def _why_not(block: nn.Module) -> str | None:
    """Why the operands of an attention cannot be reached; None if they can."""
    own = getattr(sys.modules.get(type(block).__module__), EAGER, None)
    if own is None or not hasattr(getattr(block, "config", None), "_attn_implementation"):
        return "it multiplies its operands by itself"
    if not _is_product_of_probabilities(own, block):
        return "its own attention is not seen to be a product of probabilities and values"
    return None


@torch.no_grad()
def _is_product_of_probabilities(own: Attention, block: nn.Module) -> bool:
    """Whether a model's own attention is P V with the P that it returns, seen on a few random numbers."""
    heads = getattr(block, "num_key_value_groups", 1)
    generator = torch.Generator("cpu").manual_seed(0)
    query, key, value = (
        torch.randn(1, count, 3, 4, generator=generator, device="cpu", dtype=torch.float32) for count in (heads, 1, 1)
    )
    mask = torch.zeros_like(query[:, :1, :, :3])
    try:
        output, _ = own(block, query, key, value, mask, scaling=0.5, dropout=0.0)
        made = _weighted(_probabilities(own, block, query, key, value, mask, scaling=0.5), value)
    except (RuntimeError, TypeError, AttributeError, AssertionError):
        return False
    return output.shape == made.shape and torch.allclose(output, made, rtol=1e-5, atol=1e-6)


def _quantized_blocks(model: nn.Module) -> Iterator[tuple[Any, BayesianLoraLinear]]:
    """The config of every attention that has quantizers, and the layer that owns those of its probabilities."""
    for block in model.modules():
        layers = _projections(block)
        if layers is not None and Operand.VALUES in layers[-1].operands.values():
            yield block.config, layers[-1]


def install(model: nn.Module) -> None:
    """Let the attentions that have quantizers run here, and remember what they ran before."""
    for config, layer in _quantized_blocks(model):
        if config._attn_implementation != NAME:
            layer.attention_before = config._attn_implementation
    for config, _ in list(_quantized_blocks(model)):
        _set(config, NAME)


def implementations_before(model: nn.Module) -> list[tuple[Any, str]]:
    """Configs of attentions that run here, and what they ran before."""
    return [
        (block.config, layers[-1].attention_before)
        for block in model.modules()
        if (layers := _projections(block)) is not None and layers[-1].attention_before is not None
    ]


def restore(implementations: list[tuple[Any, str]]) -> None:
    """Let attentions run again what they ran before, as told by `implementations_before`."""
    for config, name in implementations:
        if config._attn_implementation == NAME:
            _set(config, name)


def _set(config: Any, name: str) -> None:
    # A plain name would be handed down to the configs below this one.
    config._attn_implementation = {"": name}
