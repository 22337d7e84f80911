"""From a method's name to the PEFT configuration that a recipe's adapter section describes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankbits.errors import ModelError
from rankbits.recipes.schema import AdapterSection, Recipe
from rankbits.tuners.bayesian_lora import BayesianLoraConfig


def _bayesian_lora(adapter: AdapterSection) -> PeftConfig:
    return BayesianLoraConfig(
        r=adapter.r,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        target_modules=adapter.targets,
        modules_to_save=_own(adapter.modules_to_save),
        init_weights=adapter.init_weights,
        learn_bits=adapter.learn_bits,
        learn_rank=adapter.learn_rank,
        rank_gate=adapter.rank_gate,
        quantizers=adapter.quantizers,
        placement=adapter.placement,
        granularity=adapter.granularity,
        group_size=adapter.group_size,
        share_inputs=adapter.share_inputs,
        tie_groups=adapter.tie_groups,
        quantize_attention=adapter.quantize_attention,
        quantize_head=adapter.quantize_head,
        weight_gradient_rows=adapter.weight_gradient_rows,
        sampled_share=adapter.sampled_share,
        calibration_passes=adapter.calibration_passes,
        initial_bit_logit=adapter.initial_bit_logit,
        initial_rank_logit=adapter.initial_rank_logit,
    )


def _lora(adapter: AdapterSection) -> PeftConfig:
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        modules_to_save=_own(adapter.modules_to_save),
    )


def _own(names: Sequence[str] | None) -> list[str] | None:
    # PEFT writes the names of the head into the list it is given, which must not be the recipe's.
    return None if names is None else list(names)


CONFIGS: dict[str, Callable[[AdapterSection], PeftConfig]] = {"bayesian-lora": _bayesian_lora, "lora": _lora}


def attach(recipe: Recipe, model: PreTrainedModel, task_type: TaskType = TaskType.SEQ_CLS) -> PeftModel:
    """Put the recipe's adapters into a model.

    Args:
        recipe: its method and its adapter section are read.
        model: what is adapted, in place.
        task_type: how PEFT wraps the model: by the head it has.

    Raises:
        ModelError: the targets match nothing, match layers that cannot be adapted, or the configuration does not fit
            the model.
    """
    check_targets(model, recipe.adapter)
    try:
        config = CONFIGS[recipe.method](recipe.adapter)
        config.task_type = task_type
        return get_peft_model(model, config)
    except (ValueError, TypeError) as reason:
        raise ModelError(f"adapter: {recipe.method} cannot be attached to {recipe.model!r}: {reason}") from reason


def check_targets(model: nn.Module, adapter: AdapterSection) -> None:
    """Raise ModelError if a target matches no module, or one that is not linear, or if a saved module is unknown."""
    modules = {name: module for name, module in model.named_modules() if name}
    targets = adapter.targets
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
    saved = [[name] for name in adapter.modules_to_save or ()]
    _refuse_unmatched("modules_to_save", saved, modules, sorted({_last(name) for name in modules}))


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
