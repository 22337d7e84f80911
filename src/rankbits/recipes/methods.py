"""From a method's name to the PEFT configuration that a recipe's adapter section describes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import PreTrainedModel

from rankbits.errors import ModelError
from rankbits.recipes.freezing import Freezing, freeze
from rankbits.recipes.models import resolve
from rankbits.recipes.schema import Recipe
from rankbits.recipes.sizes import bottleneck_width, initial_rank, sbora_variant
from rankbits.recipes.targets import check_ranks, check_saved, check_targets
from rankbits.recipes.trainer_parts import TrainerParts, allocated_ranks, drawn_ranks, learned_gates
from rankbits.training.adalora_schedule import LEFT_OPEN, fix_ranks
from rankbits.tuners.bayesian_lora import BayesianLoraConfig
from rankbits.tuners.bottleneck import BottleneckConfig
from rankbits.tuners.dylora import DyloraConfig
from rankbits.tuners.mora import MoraConfig
from rankbits.tuners.sbora import SboraConfig

PROMPT_STARTS = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}
"""PEFT's names for how a prompt starts."""


def _bayesian_lora(recipe: Recipe, _model: PreTrainedModel) -> PeftConfig:
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
        rounding=adapter.rounding,
        code_range=adapter.code_range,
        scale_bits=adapter.scale_bits,
        activation_ranges=adapter.activation_ranges,
        granularity=adapter.granularity,
        input_granularity=adapter.input_granularity,
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


def _lora(recipe: Recipe, _model: PreTrainedModel, *, rslora: bool = False, dora: bool = False) -> PeftConfig:
    adapter = recipe.adapter
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        modules_to_save=_own(adapter.modules_to_save),
        use_rslora=rslora,
        use_dora=dora,
    )


def _mora(recipe: Recipe, _model: PreTrainedModel) -> PeftConfig:
    adapter, own = recipe.adapter, recipe.adapter.mora
    return MoraConfig(
        r=adapter.r,
        mora_type=own.type,
        rounding=own.rounding,
        fold=own.fold,
        dropout=adapter.dropout,
        target_modules=adapter.targets,
        modules_to_save=_own(adapter.modules_to_save),
    )


def _sbora(recipe: Recipe, _model: PreTrainedModel) -> PeftConfig:
    adapter, own = recipe.adapter, recipe.adapter.sbora
    return SboraConfig(
        r=adapter.r,
        alpha=adapter.alpha,
        variant=sbora_variant(recipe),
        seed=own.seed,
        disjoint=own.disjoint or recipe.method == "multi-sbora",
        first=own.first,
        dropout=adapter.dropout,
        target_modules=adapter.targets,
        modules_to_save=_own(adapter.modules_to_save),
    )


def _dylora(recipe: Recipe, _model: PreTrainedModel) -> PeftConfig:
    adapter, own = recipe.adapter, recipe.adapter.dylora
    return DyloraConfig(
        r=adapter.r,
        alpha=adapter.alpha,
        train_mode=own.mode,
        strict=own.strict,
        evaluation_rank=own.evaluation_rank,
        dropout=adapter.dropout,
        target_modules=adapter.targets,
        modules_to_save=_own(adapter.modules_to_save),
    )


def _adalora(recipe: Recipe, _model: PreTrainedModel) -> PeftConfig:
    adapter, own = recipe.adapter, recipe.adapter.adalora
    initial = initial_rank(recipe)
    return AdaLoraConfig(
        init_r=initial,
        target_r=adapter.r,
        # PEFT divides by the rank at the start, whatever ranks are left.
        lora_alpha=adapter.alpha * initial / adapter.r,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        deltaT=own.interval,
        total_step=LEFT_OPEN,
        target_modules=adapter.targets,
        modules_to_save=_own(adapter.modules_to_save),
    )


def _bottleneck(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    adapter, own = recipe.adapter, recipe.adapter.bottleneck
    return BottleneckConfig(
        kind=recipe.method,
        bottleneck_size=bottleneck_width(recipe, model.config.hidden_size),
        non_linearity=own.non_linearity,
        scaling=own.scaling,
        init_weights=False if own.init == "random" else own.init,
        dropout=adapter.dropout,
        modules_to_save=_own(adapter.modules_to_save),
    )


def _prefix(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    # A classifier of PEFT hands the prefix to the model below the head.
    body = getattr(model, model.base_model_prefix, model)
    if "past_key_values" not in inspect.signature(body.forward).parameters:
        raise ValueError(f"its attention ({type(body).__name__}) takes no keys and values but those of its tokens")
    own = recipe.adapter.prefix
    return PrefixTuningConfig(
        num_virtual_tokens=own.virtual_tokens,
        init_weights="zero" if own.init == "zero" else None,
        modules_to_save=_own(recipe.adapter.modules_to_save),
    )


def _prompt(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    own = recipe.adapter.prompt
    if hasattr(model, "score"):
        raise ValueError(
            f"{type(model).__name__} reads the last token of each row, which it cannot tell from padding where tokens "
            "are given as embeddings, as a prompt's are; expected an encoder for a task with labels"
        )
    return PromptTuningConfig(
        num_virtual_tokens=own.virtual_tokens,
        prompt_tuning_init=PROMPT_STARTS[own.init],
        prompt_tuning_init_text=own.text,
        tokenizer_name_or_path=resolve(recipe.model) if own.init == "text" else None,
        modules_to_save=_own(recipe.adapter.modules_to_save),
    )


def _own(names: Sequence[str] | None) -> list[str] | None:
    # PEFT writes the names of the head into the list it is given, which must not be the recipe's.
    return None if names is None else list(names)


@dataclass(frozen=True)
class Attachment:
    """How one method comes into a model and into its training.

    Args:
        config: PEFT's configuration, from a recipe and the model that it is for; ValueError if it does not suit it.
        training: what the Trainer needs besides, from the recipe, the adapted model and the number of steps; or None.
        on_linears: whether it sits on the linear layers that `adapter.targets` names.
        finish: what is done to the model once it is trained, or None.
    """

    config: Callable[[Recipe, PreTrainedModel], PeftConfig]
    training: Callable[[Recipe, PeftModel, int], TrainerParts] | None = None
    on_linears: bool = True
    finish: Callable[[PeftModel], object] | None = None


METHODS: dict[str, Attachment] = {
    "bayesian-lora": Attachment(_bayesian_lora, learned_gates),
    "lora": Attachment(_lora),
    "rslora": Attachment(partial(_lora, rslora=True)),
    "dora": Attachment(partial(_lora, dora=True)),
    "qlora": Attachment(_lora),
    "qdora": Attachment(partial(_lora, dora=True)),
    "mora": Attachment(_mora),
    "sbora-fa": Attachment(_sbora),
    "sbora-fb": Attachment(_sbora),
    "qsbora": Attachment(_sbora),
    "multi-sbora": Attachment(_sbora),
    "dylora": Attachment(_dylora, drawn_ranks),
    "adalora": Attachment(_adalora, allocated_ranks, finish=fix_ranks),
    "houlsby": Attachment(_bottleneck, on_linears=False),
    "pfeiffer": Attachment(_bottleneck, on_linears=False),
    "parallel": Attachment(_bottleneck, on_linears=False),
    "prefix": Attachment(_prefix, on_linears=False),
    "prompt": Attachment(_prompt, on_linears=False),
}
"""Methods that PEFT attaches. Whether their base is held in 4 bits is said in the catalogue."""
WITHOUT_ADAPTERS: dict[str, Freezing] = {rule.value: rule for rule in Freezing}
"""Methods that train weights of the model itself."""


def attach(
    recipe: Recipe, model: PreTrainedModel, task_type: TaskType = TaskType.SEQ_CLS
) -> PeftModel | PreTrainedModel:
    """Put the recipe's adapters into a model, or choose which of its own weights train.

    Args:
        recipe: its method and its adapter section are read.
        model: what is adapted, in place.
        task_type: how PEFT wraps the model: by the head it has.

    Raises:
        ModelError: the targets match nothing, match layers that cannot be adapted, or the method does not suit the
            model.
    """
    check_saved(model, recipe.adapter.modules_to_save or ())
    if recipe.method in WITHOUT_ADAPTERS:
        adapter, rule = recipe.adapter, WITHOUT_ADAPTERS[recipe.method]
        return freeze(model, rule, adapter.top_layer.layers, also=adapter.modules_to_save or ())
    attachment = METHODS[recipe.method]
    check_targets(model, recipe.adapter.targets if attachment.on_linears else None)
    try:
        config = attachment.config(recipe, model)
        config.task_type = task_type
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError) as reason:
        raise ModelError(f"adapter: {recipe.method} cannot be attached to {recipe.model!r}: {reason}") from reason
    check_ranks(adapted)
    return adapted


def training_of(recipe: Recipe, model: PeftModel | PreTrainedModel, total_steps: int) -> TrainerParts:
    """What a recipe's method brings to the Trainer. RecipeError if it does not suit the model or the run."""
    prepare = METHODS[recipe.method].training if recipe.method in METHODS else None
    if prepare is None or not isinstance(model, PeftModel):
        return TrainerParts()
    return prepare(recipe, model, total_steps)


def finish(recipe: Recipe, model: PeftModel | PreTrainedModel) -> None:
    """End the training of a method, after which what is left of it no longer changes."""
    last = METHODS[recipe.method].finish if recipe.method in METHODS else None
    if last is not None and isinstance(model, PeftModel):
        last(model)
