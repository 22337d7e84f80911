"""Fine-tuning without adapters: which weights of a model train, and the whole model on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from rankbits.errors import ModelError
from rankbits.records import ParameterRecord


class Freezing(str, Enum):
    """Which weights receive gradients, by the names that recipes use."""

    FULL = "full"
    """All."""
    TOP_LAYER = "top-layer"
    """The last blocks, of the decoder if there are two stacks, and the head unless it is tied to the embeddings."""
    FEATURE_BASED = "feature-based"
    """The head alone. The body computes fixed features, without dropout."""


def freeze(model: PreTrainedModel, rule: Freezing, layers: int = 1, also: Sequence[str] = ()) -> PreTrainedModel:
    """Let the weights of a rule train and freeze all others.

    Args:
        model: any model of transformers with a head, in place; training mode and values stay as they are.
        rule: which weights.
        layers: blocks that train, counted from the top, for `TOP_LAYER`.
        also: ends of names of modules that train besides, such as "pooler".

    Returns:
        The model.

    Raises:
        ModelError: it has too few blocks, no head, or a head that is the table of embeddings, which cannot train alone.
            The model is unchanged.
    """
    trained = list(_trained(model, rule, layers))
    chosen = [module for name, module in model.named_modules() if name.rpartition(".")[2].endswith(tuple(also))]
    trained += [parameter for module in chosen for parameter in module.parameters()]
    model.requires_grad_(requires_grad=False)
    for parameter in trained:
        parameter.requires_grad = True
    if rule is Freezing.FEATURE_BASED:
        # A Trainer puts the whole model into training mode before every batch.
        model.base_model.register_forward_pre_hook(_evaluated)
    return model


def block_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The blocks that end a model: its longest list of modules of one class, the decoder's if it has two stacks.

    Lists inside blocks (experts, sub-layers) do not count.

    Returns:
        The list's name in the model, and the list.

    Raises:
        ModelError: there is none.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack}.") for stack, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and len(set(map(type, module))) == 1:
            found.append((name, module))
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found = [(name, stack) for name, stack in found if "decoder" in name.split(".")]
    if not found:
        raise ModelError(f"{type(model).__name__} has no list of equal blocks, so no top layer to train")
    longest = max(len(stack) for _, stack in found)
    return next((name, stack) for name, stack in reversed(found) if len(stack) == longest)


def head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Weights of what stands on the model's body, without those that are tied into the body."""
    if model.base_model is not model:
        inside = {id(parameter) for parameter in model.base_model.parameters()}
        return [parameter for parameter in model.parameters() if id(parameter) not in inside]
    head = cast("nn.Module | None", model.get_output_embeddings())
    if head is None:
        return []
    own = {id(parameter) for parameter in head.parameters()}
    table = model.get_input_embeddings()
    tied = {id(parameter) for parameter in table.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) in own - tied]


def trained_parameters(model: PreTrainedModel) -> ParameterRecord:
    """Numbers of parameters that train: weights of the body's blocks as `base`, others as `head`; all if all train."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, trainable = model.num_parameters(), sum(parameter.numel() for parameter in trained)
    if trainable == total:
        head = 0
    else:
        blocks = {id(parameter) for parameter in block_stack(model)[1].parameters()}
        head = sum(parameter.numel() for parameter in trained if id(parameter) not in blocks)
    return ParameterRecord(
        trainable=trainable, adapter=0, gates=0, ranges=0, head=head, base=trainable - head, total=total
    )


def save_whole(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Save all weights, frozen ones too, with config and tokenizer, as transformers loads it."""
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _trained(model: PreTrainedModel, rule: Freezing, layers: int) -> Iterator[nn.Parameter]:
    if rule is Freezing.FULL:
        yield from model.parameters()
        return
    head = head_parameters(model)
    if rule is Freezing.FEATURE_BASED:
        if not head:
            raise ModelError(
                f"feature-based fine-tuning trains the head alone, and {type(model).__name__} has none of its own: a "
                "language model's that is tied to the table of embeddings cannot train without changing every feature; "
                "expected a task with labels, a model with tie_word_embeddings=false, or method=top-layer"
            )
        yield from head
        return
    name, stack = block_stack(model)
    if not 1 <= layers <= len(stack):
        raise ModelError(f"layers: given {layers} top blocks of {name} to train, expected 1 to {len(stack)}")
    yield from head
    for block in stack[len(stack) - layers :]:
        yield from block.parameters()


def _evaluated(body: nn.Module, _inputs: Any) -> None:
    body.eval()
