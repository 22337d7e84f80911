"""From a method's name to the PEFT configuration that a recipe's adapter section describes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from rankbits.errors import ModelError
from rankbits.recipes.schema import Recipe
from rankbits.recipes.targets import check_targets
from rankbits.recipes.trainer_parts import TrainerParts, learned_gates
from rankbits.tuners.bayesian_lora import BayesianLoraConfig


def _bayesian_lora(recipe: Recipe) -> PeftConfig:
    adapter = recipe.adapter
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
        weight_gradient_rows=adapter.weight_gradient_rows,
        sampled_share=adapter.sampled_share,
        calibration_passes=adapter.calibration_passes,
        initial_bit_logit=adapter.initial_bit_logit,
        initial_rank_logit=adapter.initial_rank_logit,
    )


def _lora(recipe: Recipe) -> PeftConfig:
    adapter = recipe.adapter
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


@dataclass(frozen=True)
class Attachment:
    """How one method comes into a model and into its training.

    Args:
        config: PEFT's configuration, from a recipe.
        training: what the Trainer needs besides, from the recipe, the adapted model and the number of steps; or None.
    """

    config: Callable[[Recipe], PeftConfig]
    training: Callable[[Recipe, PeftModel, int], TrainerParts] | None = None


METHODS: dict[str, Attachment] = {
    "bayesian-lora": Attachment(_bayesian_lora, learned_gates),
    "lora": Attachment(_lora),
}


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
        config = METHODS[recipe.method].config(recipe)
        config.task_type = task_type
        return get_peft_model(model, config)
    except (ValueError, TypeError) as reason:
        raise ModelError(f"adapter: {recipe.method} cannot be attached to {recipe.model!r}: {reason}") from reason
