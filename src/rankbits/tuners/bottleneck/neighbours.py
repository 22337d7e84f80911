"""What the end of a feed-forward has to know of its block: what entered another module, and the norm behind it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankbits.tuners.bottleneck.config import BottleneckConfig, Kind


class Ear:
    """Remembers what entered a module until the end of the feed-forward has used it.

    Under gradient checkpointing both run again in the same order, so what is recomputed is heard anew.

    Args:
        module: a module that runs before the end of the feed-forward, in the same block.
    """

    def __init__(self, module: nn.Module) -> None:
        self.heard: Tensor | None = None
        self._handle = module.register_forward_pre_hook(self._hear, with_kwargs=True)

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.heard = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    def forget(self) -> None:
        """Let go of the tensor, and of the graph behind it."""
        self.heard = None

    def close(self) -> None:
        """Take the hook out of the module."""
        self.forget()
        self._handle.remove()


@dataclass(frozen=True)
class Neighbours:
    """The other modules of a block that an adapter needs.

    Args:
        listened: the module whose input the adapter reads; None if it reads nothing from elsewhere.
        norm: the norm that the model applies to the residual sum; None if there is none.
    """

    listened: nn.Module | None = None
    norm: nn.Module | None = None


def neighbours_of(model: nn.Module, config: BottleneckConfig, key: str, target: nn.Module) -> Neighbours:
    """The neighbours of one layer to be adapted.

    Args:
        model: the base model.
        config: with its `feed_forward` filled in, where it has one.
        key: qualified name of the layer.
        target: the layer.

    Raises:
        ValueError: the layer is not the end of the feed-forward that the config describes, a part of it does not exist
            or has another width, or it is to be trained in full.
    """
    paths = config.feed_forward
    if Kind(config.kind) is Kind.HOULSBY or paths is None:
        return Neighbours()
    block = _block(paths, key)
    listened = _part(model, config, block, "input")
    (given, _), (_, written) = _sizes_of(listened), _sizes_of(target)
    if given is not None and given != written:
        raise ValueError(
            f"{block + paths['input']!r} reads {given} values, but {key!r} writes {written}: `feed_forward` must "
            "describe a feed-forward that returns to the hidden size"
        )
    if Kind(config.kind) is Kind.PARALLEL:
        return Neighbours(listened)
    if "norm_before" in paths:
        return Neighbours(_part(model, config, block, "norm_before"))
    return Neighbours(listened, _part(model, config, block, "norm_after"))


def refuse_copies(model: nn.Module, names: Collection[str]) -> None:
    """Refuse to train modules in full that an adapter listens to: PEFT would copy them, hook and all.

    Args:
        model: the base model, with the adapters it has so far.
        names: endings of the names of the modules that a new adapter trains.

    Raises:
        ValueError: there is such a module. The model is unchanged.
    """
    for name, module in model.named_modules():
        listened = any(isinstance(getattr(hook, "__self__", None), Ear) for hook in module._forward_pre_hooks.values())
        if listened and name.endswith(tuple(names)):
            raise ValueError(
                f"{name!r} is to be trained in full, but an adapter that is there already reads what enters it: delete "
                "that adapter, or load this one into a base model of its own"
            )


def _block(paths: Mapping[str, str], key: str) -> str:
    """The name of the block of a layer, with a dot behind it; empty if the model is the block."""
    output = paths["output"]
    if key != output and not key.endswith(f".{output}"):
        raise ValueError(
            f"{key!r} is not the end of a feed-forward, which is {output!r} here, and adapters of this kind stand "
            "nowhere else: leave it out of `target_modules`, or describe another `feed_forward`"
        )
    return key.removesuffix(output)


def _part(model: nn.Module, config: BottleneckConfig, block: str, part: str) -> nn.Module:
    path = block + (config.feed_forward or {})[part]
    saved = [name for name in config.modules_to_save or () if path.endswith(name)]
    if saved:
        raise ValueError(
            f"`modules_to_save` {saved} would replace {path!r}, whose input or output the adapter reads: train other "
            "modules in full, or use kind='houlsby'"
        )
    try:
        return model.get_submodule(path)
    except AttributeError as reason:
        raise ValueError(
            f"the model has no module {path!r}, which `feed_forward` names as {part!r} of the block {block!r}"
        ) from reason


def _sizes_of(module: nn.Module) -> tuple[int | None, int | None]:
    """Inputs and outputs of a linear layer; None for what is not one."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (inputs if isinstance(inputs, int) else None), (outputs if isinstance(outputs, int) else None)
