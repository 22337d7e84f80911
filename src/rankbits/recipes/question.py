"""What an estimate is asked: a model's shape, a method and the settings of training, from a recipe or from keys."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo, field_validator
from yaml import YAMLError

from rankbits import tasks
from rankbits.accounting.architectures.read import Head, find_config, read_shape
from rankbits.accounting.budget import Budget, parse_budget
from rankbits.accounting.methods import BOTTLENECKS, ON_LINEARS
from rankbits.accounting.params import check_attention, check_head, quantized_heads, targeted
from rankbits.accounting.quantizers import HEAD_SITES, sites_of
from rankbits.accounting.settings import Base, TrainingSettings
from rankbits.accounting.spec import Method, MethodSpec, ModelShape
from rankbits.accounting.widths import FLOAT, FOUR_BIT_BASES
from rankbits.embedded import locate
from rankbits.errors import RecipeError
from rankbits.recipes.budgets import budgets_of
from rankbits.recipes.catalogue import EMBEDDED_MODELS
from rankbits.recipes.counted import base_of, grids_of, in_full_with, own_sites, spec_of, targets_of
from rankbits.recipes.fields import STRICT, Count, Text
from rankbits.recipes.problems import Problem, describe, problems_of
from rankbits.recipes.schema import QuantizerSite, Recipe
from rankbits.records import CountOptions

NAMES = [method.value for method in Method]


def _in_order(methods: Collection[Method]) -> list[str]:
    return [method.value for method in Method if method in methods]


GRIDS = (
    "placement",
    "rounding",
    "code_range",
    "scale_bits",
    "activation_ranges",
    "granularity",
    "input_granularity",
    "group_size",
    "share_inputs",
    "tie_groups",
    "quantize_attention",
    "quantize_head",
)
"""Keys about where the grids of Bayesian-LoRA lie and what shares them."""
USED_BY = {
    "r": _in_order(ON_LINEARS),
    "targets": _in_order(ON_LINEARS),
    "quantizers": [Method.BAYESIAN_LORA.value],
    "learn_rank": [Method.BAYESIAN_LORA.value],
    "bits": [Method.BAYESIAN_LORA.value],
    **{key: [Method.BAYESIAN_LORA.value] for key in GRIDS},
    "width": _in_order(BOTTLENECKS),
    "virtual_tokens": [Method.PREFIX.value, Method.PROMPT.value],
    "layers": [Method.TOP_LAYER.value],
}
"""Methods that a key means something to. What would change nothing is refused, for it was meant to change something."""


def _known_method(value: str) -> str:
    if value not in NAMES:
        raise ValueError(f"one of {', '.join(NAMES)}")
    return value


class Keys(BaseModel):
    """What can be asked of a model that no recipe names; lengths are tokens."""

    model_config = STRICT
    method: Annotated[str, AfterValidator(_known_method)] = Field(
        default=Method.BAYESIAN_LORA.value, description=f"one of {', '.join(NAMES)}"
    )
    r: Count = Field(default=8, description="a whole number of at least 1: the maximum rank")
    targets: Annotated[list[Text], Field(min_length=1)] | Text | None = Field(
        default=None,
        description="a list of layer names, one pattern such as all-linear, or null for the model's usual ones",
    )
    modules_to_save: list[Text] = Field(default=[], description="a list of names of modules trained in full")
    quantizers: list[QuantizerSite] | None = Field(
        default=None, description="a list of quantizer sites, or null for all but the input"
    )
    learn_rank: bool = Field(default=True, description="true or false")
    bits: Literal[2, 4, 8, 16, 32] = Field(
        default=32, description="2, 4, 8, 16 or 32: the width that every quantizer is assumed to have learned"
    )
    placement: Literal["separate", "merged"] = Field(default="separate", description="separate or merged")
    rounding: Literal["nearest", "compensated"] = Field(default="nearest", description="nearest or compensated")
    code_range: Literal["narrow", "full"] = Field(default="narrow", description="narrow or full")
    scale_bits: Literal[32, 16, 8] = Field(default=32, description="32, 16 or 8: bits of each scale of a weight")
    activation_ranges: Literal["largest", "fitted", "affine"] = Field(
        default="largest", description="largest, fitted or affine"
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
    width: Count | None = Field(default=None, description="a whole number of at least 1: width of a bottleneck")
    virtual_tokens: Count = Field(default=20, description="a whole number of at least 1: length of a prefix or prompt")
    layers: Annotated[int, Field(ge=0)] = Field(
        default=0, description="a whole number of at least 0: blocks that top-layer fine-tuning trains"
    )
    head: Literal["none", "classification", "language-model"] | None = Field(
        default=None, description="none, classification, language-model, or null for the model's usual one"
    )
    num_labels: Count = Field(default=2, description="a whole number of at least 1")
    sequence_length: Count = Field(description="a whole number of at least 1: tokens per sequence")
    source_length: Count | None = Field(
        default=None, description="a whole number of at least 1: tokens of the encoder where there are two stacks"
    )
    cache_length: Annotated[int, Field(ge=0)] = Field(
        default=0, description="a whole number of at least 0: tokens that a decoder has in its cache already"
    )
    batch_size: Count = Field(default=1, description="a whole number of at least 1: sequences per device and step")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="fp32 or bf16")
    base: Literal["fp32", "bf16", "fp16", "nf4", "nf4-double"] | None = Field(
        default=None, description="fp32, bf16, fp16, nf4, nf4-double, or null for what precision and method ask for"
    )
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = Field(
        default="adamw", description="adamw, adamw-8bit or paged-adamw-8bit"
    )
    master_weights: bool = Field(
        default=False, description="true or false: fp32 copies of half-precision weights that are trained"
    )
    gradient_checkpointing: bool = Field(default=False, description="true or false")
    attention: Literal["eager", "sdpa"] = Field(default="sdpa", description="eager or sdpa")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="cpu or cuda")

    @field_validator(*USED_BY)
    @classmethod
    def _is_used(cls, value: object, info: ValidationInfo) -> object:
        name = str(info.field_name)
        method, users = info.data.get("method"), USED_BY[name]
        if method is not None and method not in users and value != cls.model_fields[name].default:
            raise ValueError(f"none with method={method}: only {', '.join(users)} can use it")
        return value


@dataclass(frozen=True)
class Question:
    """Everything an estimate depends on.

    Args:
        title: what was asked, in words.
        shape: the model.
        spec: the method.
        settings: of training.
        options: lengths and batch that bit operations are counted at: one batch as inference sees it.
        budget: what is allowed, if anything was said; of several the first.
    """

    title: str
    shape: ModelShape
    spec: MethodSpec
    settings: TrainingSettings
    options: CountOptions
    budget: Budget | None = None


def from_recipe(recipe: Recipe, budget: str | None = None) -> Question:
    """The question that a recipe asks: its task's longest rows, its batch, its method.

    Raises:
        ModelError, AssetError: there is no config of its model on this machine, or it is not understood.
        RecipeError: the budget is not one, or the model's files are quantized already.
    """
    task = tasks.get(recipe.task.name)
    head = Head.LANGUAGE_MODEL if task.kind == "completion" else Head.CLASSIFICATION
    config = config_of(recipe.model)
    shape = read_shape(config, name=recipe.model, head=head, num_labels=max(task.num_labels, 1))
    if "quantization_config" in config:
        raise _quantized_already(f"recipe {recipe.name}: {recipe.model}", "estimate the model by its own name, with")
    spec = spec_of(recipe, shape, head)
    check_attention(shape, spec)
    check_head(shape, spec)
    settings = TrainingSettings(
        batch=recipe.training.batch_size,
        sequence_length=recipe.task.max_length,
        precision=recipe.training.precision,
        base=base_of(recipe),
        checkpointing=recipe.training.gradient_checkpointing,
    )
    options = CountOptions(
        query_len=recipe.task.max_length,
        key_len=recipe.task.max_length,
        head="all" if head is Head.LANGUAGE_MODEL else "out",
    )
    title = f"recipe {recipe.name}: {recipe.model}, {recipe.method}"
    budgets = budgets_of(recipe)
    if budget is not None:
        gates = recipe.gates
        length = recipe.task.max_length
        budgets = [parse_budget(budget, gates.reference_bits, sequence_length=length, scope=gates.scope)]
    return Question(title, shape, spec, settings, options, budgets[0] if budgets else None)


def from_keys(model: str, overrides: Sequence[str], budget: str | None = None) -> Question:
    """The question that `key=value` texts ask of a model.

    Args:
        model: an embedded model, a published shape, a local config or folder, or a hub id in the local cache.
        overrides: `key=value` texts for the keys of `Keys`.
        budget: such as "bits=4".

    Raises:
        RecipeError: a key is unknown or a value is not what it should be; all problems are listed together.
        ModelError, AssetError: there is no config of the model on this machine, or it is not understood.
    """
    keys = checked_keys(model, overrides)
    config = config_of(model)
    head = _head(config, model, keys)
    shape = read_shape(config, name=model, head=head, num_labels=keys.num_labels)
    method = Method(keys.method)
    spec = MethodSpec(
        method,
        rank=keys.r,
        targets=targets_of(keys.targets),
        sites=own_sites(method, keys),
        learn_rank=keys.learn_rank,
        **grids_of(keys),
        width=keys.width,
        virtual_tokens=keys.virtual_tokens,
        trained_in_full=in_full_with(method, shape, keys.modules_to_save, head),
        layers=keys.layers,
    )
    check_attention(shape, spec)
    check_head(shape, spec)
    if keys.bits != FLOAT:
        sites = sites_of(targeted(shape, spec), spec)
        sites |= {linear.name: HEAD_SITES for linear in quantized_heads(shape, spec)}
        widths = {name: dict.fromkeys(of_layer, keys.bits) for name, of_layer in sites.items()}
        spec = replace(spec, widths=widths)
    settings = TrainingSettings(
        batch=keys.batch_size,
        sequence_length=max(keys.sequence_length, keys.source_length or 0),
        precision=keys.precision,
        base=_base(config, model, keys),
        optimizer=keys.optimizer,
        checkpointing=keys.gradient_checkpointing,
        master_weights=keys.master_weights,
        attention=keys.attention,
        device=keys.device,
    )
    options = CountOptions(
        query_len=keys.sequence_length,
        key_len=keys.sequence_length + keys.cache_length,
        source_len=keys.source_length,
        head="all" if head is Head.LANGUAGE_MODEL else "out",
    )
    return Question(
        f"{model}, {keys.method}", shape, spec, settings, options, None if budget is None else parse_budget(budget)
    )


def checked_keys(model: str, overrides: Sequence[str]) -> Keys:
    """The keys that `key=value` texts give. RecipeError lists all problems together."""
    problems: list[Problem] = []
    raw: dict[str, Any] = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            problems.append(Problem("", f"given {override!r}, expected key=value such as sequence_length=512"))
            continue
        try:
            content = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except (YAMLError, OmegaConfBaseException, ValueError) as error:
            problems.append(Problem(key, f"the value cannot be read: {str(error).partition(chr(10))[0]}"))
            continue
        raw.update({str(name): value for name, value in dict(content).items()} if isinstance(content, dict) else {})
    try:
        keys = Keys.model_validate(raw)
    except ValidationError as error:
        problems += problems_of(error, raw, complete=not problems, schema=Keys)
        raise RecipeError(describe(f"the estimate of {model}", problems)) from None
    if problems:
        raise RecipeError(describe(f"the estimate of {model}", problems))
    return keys


def config_of(model: str) -> dict[str, Any]:
    """The config of an embedded model, or of one that is found on this machine.

    Raises:
        ModelError, AssetError: there is none.
    """
    embedded = {known.name: known for known in EMBEDDED_MODELS}
    if model not in embedded:
        return find_config(model)
    known = embedded[model]
    if known.shape is not None:
        return find_config(known.shape)
    parsed: dict[str, Any] = json.loads((locate(known.file).parent / "config.json").read_text(encoding="utf-8"))
    return parsed


def _head(config: dict[str, Any], model: str, keys: Keys) -> Head:
    """The head that was asked for, else a language model's for what generates and a classifier's for what does not."""
    if keys.head is not None:
        return Head(keys.head)
    bare = read_shape(config, name=model)
    return Head.LANGUAGE_MODEL if bare.decoder else Head.CLASSIFICATION


def _base(config: dict[str, Any], model: str, keys: Keys) -> Base:
    """How the base is held: as asked, in 4 bits where the method wants that, else in the precision of training."""
    if keys.base is not None:
        return keys.base
    if "quantization_config" in config:
        raise _quantized_already(f"the estimate of {model}", "say")
    return "nf4-double" if Method(keys.method) in FOUR_BIT_BASES else keys.precision


def _quantized_already(what: str, advice: str) -> RecipeError:
    return RecipeError(
        f"{what}: its files are quantized already, and how they are held in memory depends on the library that reads "
        f"them; {advice} base=nf4, nf4-double, bf16, fp16 or fp32"
    )
