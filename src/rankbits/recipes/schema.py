"""What a recipe may say: every key, its type and its limits, checked before anything is loaded.

The description of a field says what is expected of its value; error messages quote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from rankbits.accounting.budget import parse_budget
from rankbits.errors import RecipeError
from rankbits.recipes.catalogue import method_names
from rankbits.recipes.fields import STRICT, Count, Positive, Share, Text, Weight
from rankbits.recipes.method_settings import (
    AdaloraSettings,
    BottleneckSettings,
    DyloraSettings,
    MoraSettings,
    Nf4Settings,
    PrefixSettings,
    PromptSettings,
    SboraSettings,
    TopLayerSettings,
)
from rankbits.recipes.nearest import nearest

QUANTIZER_SITES = ("weight", "down", "diagonal", "up", "down_output", "diagonal_output", "output", "input")
"""Those that can be chosen by name; attention probabilities have a quantizer with all operands beside them, or none."""


def _known(kind: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        hint = "".join(f"; nearest: {name}" for name in nearest(value, known))
        raise ValueError(f"one of the known {kind}s: {', '.join(known)}{hint}")
    return value


def _known_method(value: str) -> str:
    return _known("method", value, method_names())


def _known_task(value: str) -> str:
    # Imported here: tasks build on numpy, which a recipe's other checks do not need.
    from rankbits import tasks

    return _known("task", value, tasks.names())


def _known_site(value: str) -> str:
    return _known("quantizer site", value, QUANTIZER_SITES)


def _budget(value: str) -> str:
    try:
        parse_budget(value)
    except RecipeError as reason:
        raise ValueError(str(reason).partition("expected ")[2] or str(reason)) from None
    return value


def _plain_name(value: str) -> str:
    if PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts:
        raise ValueError("a name that stays below the folder of runs: no leading '/' and no '..'")
    return value


BudgetText = Annotated[str, AfterValidator(_budget)]
QuantizerSite = Annotated[str, AfterValidator(_known_site)]


class TaskSection(BaseModel):
    """What is learned and from which rows."""

    model_config = STRICT
    name: Annotated[str, AfterValidator(_known_task)] = Field(description="the name of a task (`rankbits list tasks`)")
    data: Text | None = Field(
        default=None, description="a folder of local files, a hub data set, or null for the task's own"
    )
    train_rows: Count | None = Field(default=None, description="a whole number of at least 1, or null for all rows")
    max_length: Count = Field(default=128, description="a whole number of at least 1: tokens a row is cut to")
    evaluate_on: Literal["validation", "development"] = Field(
        default="validation", description="validation or development"
    )
    start_at_mean: bool = Field(
        default=False,
        description="true or false: the head of a regression task starts at the mean of the training labels",
    )


class AdapterSection(BaseModel):
    """What is attached to the model: rank, targets, what is quantized, how gates start, what single methods need.

    rslora scales by alpha / sqrt(r) instead of alpha / r; mora has no scale. Methods that do not sit on linear layers
    (houlsby, pfeiffer, parallel, prefix, prompt) use neither r nor alpha nor targets.
    """

    model_config = STRICT
    r: Count = Field(default=8, description="a whole number of at least 1: the maximum rank")
    alpha: Positive = Field(default=16, description="a number above 0: the update is scaled by alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="a number from 0 to below 1")
    targets: Annotated[list[Text], Field(min_length=1)] | Text | None = Field(
        default=None,
        description="a list of layer names, one pattern such as all-linear, or null for the model's usual ones",
    )
    modules_to_save: list[Text] | None = Field(
        default=None, description="a list of layer names trained in full, or null"
    )
    learn_bits: bool = Field(default=True, description="true or false")
    learn_rank: bool = Field(default=True, description="true or false")
    rank_gate: Literal["ste", "hard_concrete"] = Field(default="ste", description="ste or hard_concrete")
    init_weights: Literal["lora", "adalora"] = Field(default="lora", description="lora or adalora")
    quantizers: list[QuantizerSite] | None = Field(
        default=None,
        description="a list of quantizer sites, or null for all but the input (merged: the weight and the input)",
    )
    sampled_share: float = Field(
        default=1.0, gt=0, le=1, description="a number above 0, at most 1: quantizers whose gates are sampled in a pass"
    )
    calibration_passes: Count = Field(
        default=50, description="a whole number of at least 1: passes that only record ranges"
    )
    placement: Literal["separate", "merged"] = Field(
        default="separate", description="separate or merged: whether the update lies beside the quantized weight"
    )
    rounding: Literal["nearest", "compensated"] = Field(
        default="nearest", description="nearest or compensated: which codes a weight gets at its final width"
    )
    code_range: Literal["narrow", "full"] = Field(
        default="narrow", description="narrow or full: whether a weight has 2^b - 1 or all 2^b codes at its final width"
    )
    scale_bits: Literal[32, 16, 8] = Field(
        default=32, description="32, 16 or 8: bits that each scale of a weight is stored in at its final width"
    )
    activation_ranges: Literal["largest", "fitted", "affine"] = Field(
        default="largest", description="largest, fitted or affine: how activations get the ranges of their final widths"
    )
    granularity: Literal["tensor", "channel", "group"] = Field(
        default="tensor", description="tensor, channel or group: which numbers of a weight share a range"
    )
    input_granularity: Literal["tensor", "group"] = Field(
        default="tensor", description="tensor or group: whether groups of inputs have a range each"
    )
    group_size: Count = Field(default=64, description="a whole number of at least 1: inputs of a row in a group")
    share_inputs: bool = Field(default=True, description="true or false")
    tie_groups: Literal["fused"] | None = Field(default=None, description="fused or null")
    quantize_attention: bool = Field(
        default=False, description="true or false: quantizers for both operands of the attention products"
    )
    quantize_head: bool = Field(
        default=False, description="true or false: quantizers for the linear layers that are trained in full"
    )
    weight_gradient_rows: Count | None = Field(
        default=None, description="a whole number of at least 1, or null for all rows"
    )
    initial_bit_logit: float = Field(default=6.0, description="a finite number")
    initial_rank_logit: float = Field(default=6.0, description="a finite number")
    mora: MoraSettings = Field(default_factory=MoraSettings)
    sbora: SboraSettings = Field(default_factory=SboraSettings)
    dylora: DyloraSettings = Field(default_factory=DyloraSettings)
    bottleneck: BottleneckSettings = Field(default_factory=BottleneckSettings)
    prefix: PrefixSettings = Field(default_factory=PrefixSettings)
    prompt: PromptSettings = Field(default_factory=PromptSettings)
    nf4: Nf4Settings = Field(default_factory=Nf4Settings)
    adalora: AdaloraSettings = Field(default_factory=AdaloraSettings)
    top_layer: TopLayerSettings = Field(default_factory=TopLayerSettings)

    @field_validator("quantize_attention", "quantize_head")
    @classmethod
    def _more_needs_quantizers(cls, more: bool, info: ValidationInfo) -> bool:
        if more and info.data.get("learn_bits") is False:
            raise ValueError("false where adapter.learn_bits is false, with which nothing has a quantizer")
        return more

    @field_validator("placement")
    @classmethod
    def _placement_has_no_dropout(cls, placement: str, info: ValidationInfo) -> str:
        if placement == "merged" and info.data.get("dropout"):
            raise ValueError("separate where adapter.dropout is above 0: a merged update is part of the weight")
        return placement


class GatesSection(BaseModel):
    """How ranks and bits are learned: penalty, phases and rates. Phases are fractions of all optimizer steps."""

    model_config = STRICT
    budget: BudgetText | Annotated[list[BudgetText], Field(min_length=1)] | None = Field(
        default=None,
        description="a budget such as bops=0.25, bytes=0.3, bits=4 or rank=2.5, a list of them, one of each quantity, "
        "or null",
    )
    reference_bits: Literal[16, 32] = Field(
        default=16, description="16 or 32: width of the base model that budgets of bops and bytes are shares of"
    )
    scope: Literal["adapted", "model"] = Field(
        default="adapted",
        description="adapted or model: whether a budget of bops counts the adapted layers or the whole model",
    )
    allocation: Literal["evidence", "descent"] | None = Field(
        default=None,
        description="evidence, descent or null: under a budget gates are chosen when the warm-up ends, or close "
        "one after another; null chooses by the budget",
    )
    lambda_q: Weight | None = Field(
        default=None,
        description="a number of at least 0: weight of the bit penalty, or null for 0.001, 0 under a budget",
    )
    lambda_r: Weight | None = Field(
        default=None,
        description="a number of at least 0: weight of the rank penalty, or null for 0.001, 0 under a budget",
    )
    warmup: Share = Field(default=0.25, description="a fraction from 0 to 1: training without penalty")
    ramp: Share = Field(default=0.25, description="a fraction from 0 to 1: the penalty grows to its full weight")
    fixed: Share = Field(default=0.25, description="a fraction from 0 to 1: training with gates fixed, at the end")
    learning_rate: Positive | Literal["auto"] = Field(default="auto", description="a number above 0, or auto")
    range_learning_rate: Positive = Field(default=1e-3, description="a number above 0")
    eps: Positive = Field(default=1e-8, description="a number above 0: Adam's eps for the gates")
    weighting: Literal["const", "bop", "byte"] = Field(default="const", description="const, bop or byte")
    reduction: Literal["sum", "mean"] = Field(default="sum", description="sum or mean")

    @field_validator("fixed")
    @classmethod
    def _phases_fit(cls, fixed: float, info: ValidationInfo) -> float:
        others = [info.data.get(name) for name in ("warmup", "ramp")]
        shares = [*(share for share in others if share is not None), fixed]
        if sum(shares) > 1 + 1e-9:
            written = " + ".join(f"{share:g}" for share in shares)
            raise ValueError(f"warmup + ramp + fixed of at most 1, they are {written} = {sum(shares):g}")
        return fixed


class TrainingSection(BaseModel):
    """The Trainer's settings."""

    model_config = STRICT
    max_steps: Count | None = Field(
        default=None, description="a whole number of at least 1, or null; it wins over epochs"
    )
    epochs: Positive | None = Field(default=None, description="a number above 0, or null where max_steps is given")
    batch_size: Count = Field(default=32, description="a whole number of at least 1: rows per device and step")
    accumulation: Count = Field(default=1, description="a whole number of at least 1: batches per optimizer step")
    learning_rate: Positive = Field(description="a number above 0")
    warmup_ratio: float = Field(
        default=0.0, ge=0, lt=1, description="a fraction from 0 to below 1: rise of the learning rate"
    )
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear", description="linear, cosine, constant or constant_with_warmup"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="a number of at least 0")
    max_grad_norm: Positive = Field(default=1.0, description="a number above 0")
    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="a whole number from 0 to 4294967295")
    save_steps: Count = Field(default=200, description="a whole number of at least 1: steps between checkpoints")
    logging_steps: Count = Field(default=10, description="a whole number of at least 1: steps between two log lines")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="fp32 or bf16")
    gradient_checkpointing: bool = Field(default=False, description="true or false")
    group_by_length: bool = Field(default=False, description="true or false: batches of rows of about one length")
    report_to: list[Text] = Field(default=[], description="a list of the Trainer's tracking integrations")

    @field_validator("epochs")
    @classmethod
    def _has_a_length(cls, epochs: float | None, info: ValidationInfo) -> float | None:
        if epochs is None and "max_steps" in info.data and info.data["max_steps"] is None:
            raise PydanticCustomError("nothing_given", "a number above 0 here, or training.max_steps")
        return epochs

    @field_validator("scheduler")
    @classmethod
    def _warmup_is_used(cls, scheduler: str, info: ValidationInfo) -> str:
        if scheduler == "constant" and info.data.get("warmup_ratio"):
            raise ValueError("constant_with_warmup where training.warmup_ratio is above 0: constant ignores it")
        return scheduler


class Recipe(BaseModel):
    """A whole experiment as data."""

    model_config = STRICT
    name: Annotated[str, Field(pattern=r"^[\w][\w./-]*$", max_length=200), AfterValidator(_plain_name)] = Field(
        description="letters, digits, '.', '_', '-' and '/'"
    )
    description: str = Field(default="", description="text")
    task: TaskSection
    model: Text = Field(description="minilm, a hub id or a local folder (`rankbits list models`)")
    method: Annotated[str, AfterValidator(_known_method)] = Field(
        default="bayesian-lora", description="the name of a method (`rankbits list methods`)"
    )
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    gates: GatesSection = Field(default_factory=GatesSection)
    training: TrainingSection
    output: Text | None = Field(default=None, description="a folder for this run, or null for runs/<name>")
