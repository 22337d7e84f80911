"""Whether the layers that a recipe names are there, and are layers that can be adapted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankbits.errors import ModelError


def check_targets(model: nn.Module, targets: list[str] | str | None) -> None:
    """Raise ModelError if a target matches no module, or one that is not linear."""
    modules = _modules(model)
    if targets is not None and targets != "all-linear":
        _check_pattern(targets)
        wanted = [targets] if isinstance(targets, str) else [[target] for target in targets]
        _refuse_unmatched("targets", wanted, modules, sorted({_last(n) for n, m in modules.items() if _is_linear(m)}))
        matched = {name: module for name, module in modules.items() if _matches(name, targets)}
        wrong = [f"{name} ({type(module).__name__})" for name, module in matched.items() if not _is_linear(module)]
        if wrong:
            raise ModelError(
                f"adapter.targets: {targets!r} matches {len(wrong)} module(s) that are not linear layers: "
                f"{', '.join(wrong[:5])}; only torch.nn.Linear and transformers' Conv1D can be adapted"
            )


def check_ranks(model: nn.Module) -> None:
    """Raise ModelError if an adapter of PEFT's LoRA or AdaLoRA has a rank that its matrix cannot have."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            rank, shape = max(layer.r.values()), [int(layer.out_features or 0), int(layer.in_features or 0)]
            if rank > min(shape):
                raise ModelError(
                    f"adapter.r: {name!r} would have rank {rank}, but its weight is {shape}; expected at most "
                    f"{min(shape)}"
                )


def check_saved(model: nn.Module, names: Sequence[str]) -> None:
    """Raise ModelError if a module that is to be trained in full is unknown."""
    modules = _modules(model)
    saved = [[name] for name in names]
    _refuse_unmatched("modules_to_save", saved, modules, sorted({_last(name) for name in modules}))


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name}


def _check_pattern(targets: list[str] | str) -> None:
    try:
        re.compile(targets if isinstance(targets, str) else "")
    except re.error as reason:
        raise ModelError(f"adapter.targets: {targets!r} is not a regular expression: {reason}") from reason


def _refuse_unmatched(
    key: str, wanted: Sequence[list[str] | str], modules: Mapping[str, nn.Module], known: list[str]
) -> None:
    missing = [target for target in wanted if not any(_matches(name, target) for name in modules)]
    if missing:
        named = ", ".join(repr(target if isinstance(target, str) else target[0]) for target in missing)
        names = ", ".join(name for name in known if not name.isdigit())
        raise ModelError(f"adapter.{key}: {named} matches no module of the model; it has {names}")


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _matches(name: str, targets: list[str] | str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))
