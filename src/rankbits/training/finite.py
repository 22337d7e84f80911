"""Finding where NaN or infinity enters a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in _tensors(v)]
    return []


def _is_finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value) if t.is_floating_point())


@torch.no_grad()
def first_non_finite_module(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Run a forward pass again and name the first innermost module whose output is not finite.

    Args:
        model: the model, in whatever mode it is.
        args: positional inputs of its forward.
        kwargs: keyword inputs of its forward.

    Returns:
        Qualified module name, or None if every module's output was finite (then the loss itself is the culprit).
    """
    culprits: list[str] = []

    def check(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not culprits and not _is_finite(output):
                culprits.append(name)

        return hook

    handles = [module.register_forward_hook(check(name)) for name, module in model.named_modules() if name]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return culprits[0] if culprits else None


def first_non_finite_gradient(model: nn.Module) -> str | None:
    """Name of the first parameter whose gradient holds NaN or infinity, or None."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # One look at all norms together: asking for each gradient would wait for the device each time.
    norms = torch._foreach_norm(list(gradients.values()))
    if not norms or bool(torch.isfinite(torch.stack([norm.to(norms[0].device) for norm in norms])).all()):
        return None
    return next((name for name, gradient in gradients.items() if not _is_finite(gradient)), None)


def first_non_finite_gradient_again(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Run a training pass again and name the first parameter, in the order of the backward pass, with a bad gradient.

    Clipping, and the Trainer even where it only measures the norm, multiplies all gradients by one factor: a single NaN
    is in all of them before anybody can look. Here they are seen one by one, before they are accumulated.

    Args:
        model: the model, in whatever mode it is.
        args: positional inputs of its forward.
        kwargs: keyword inputs of its forward, with labels, so that its output has a loss.

    Returns:
        Parameter name, or None if the pass has no loss or the gradients are finite this time.
    """
    culprits: list[str] = []

    def check(name: str) -> Any:
        def hook(grad: Tensor) -> None:
            if not culprits and not _is_finite(grad):
                culprits.append(name)

        return hook

    handles = [p.register_hook(check(name)) for name, p in model.named_parameters() if p.requires_grad]
    try:
        loss = getattr(model(*args, **kwargs), "loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return culprits[0] if culprits else None
