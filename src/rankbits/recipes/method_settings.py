"""Settings that one method has and others do not: sections of `adapter`, each read by the methods that list it.

What methods share (r, alpha, dropout, targets, modules_to_save) lies in `adapter` itself.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from rankbits.accounting.mora import NUMBERED, usual_kind
from rankbits.recipes.fields import STRICT, Count, Positive, Share, Text, Weight


class MoraSettings(BaseModel):
    """How MoRA compresses and decompresses. It has no scale: adapter.alpha is not used."""

    model_config = STRICT
    type: (
        Literal[
            "truncation",
            "sharing",
            "sharing_adjacent",
            "sharing_adjacent_inputs",
            "sharing_adjacent_outputs",
            "decoupling",
            "rotation",
        ]
        | None
    ) = Field(
        default=None,
        description="truncation, sharing, sharing_adjacent, sharing_adjacent_inputs, sharing_adjacent_outputs, "
        "decoupling, rotation, a number of the paper's code (1, 2, 3, 4, 6), or null for rotation below rank 64 and "
        "sharing from it on",
    )
    rounding: Literal["nearest", "floor"] = Field(
        default="nearest", description="nearest or floor: how the side of the matrix becomes a whole number"
    )
    fold: bool = Field(
        default=False, description="true or false: add results beyond the outputs to the first ones, or cut them off"
    )

    @field_validator("type", mode="before")
    @classmethod
    def _number_as_name(cls, given: object) -> object:
        return NUMBERED.get(given, given) if type(given) is int else given

    def kind(self, r: int) -> str:
        """The type, the usual one for a rank where none is given."""
        return self.type or usual_kind(r)


class SboraSettings(BaseModel):
    """Which rows or columns SBoRA trains."""

    model_config = STRICT
    variant: Literal["fa", "fb"] | None = Field(
        default=None, description="fa, fb, or null for what the method's name says, else fa"
    )
    seed: int = Field(default=0, ge=0, description="a whole number of at least 0: draws the rows or columns")
    disjoint: bool = Field(
        default=False,
        description="true or false: share no row or column with another adapter of the base, as multi-sbora never does",
    )
    first: int = Field(
        default=0,
        ge=0,
        description="a whole number of at least 0: place in each layer's random order to begin at, for a further task "
        "the sum of the ranks of those before it",
    )


class DyloraSettings(BaseModel):
    """What a step of DyLoRA trains, and the ranks it is used at."""

    model_config = STRICT
    mode: Literal["frozen", "prefix"] = Field(
        default="frozen", description="frozen or prefix: train row and column b of the drawn rank alone, or all up to b"
    )
    strict: bool = Field(
        default=True, description="true or false: put back what the optimizer moved although the step did not train it"
    )
    evaluation_rank: Count | None = Field(
        default=None, description="a whole number of at least 1: the rank that is scored and saved, or null for r"
    )
    evaluate_ranks: list[Count] = Field(
        default=[], description="a list of whole numbers from 1 to r: further ranks to score"
    )


class BottleneckSettings(BaseModel):
    """What a bottleneck adapter is made of. It stands where sub-layers end: adapter.targets, r, alpha are not used."""

    model_config = STRICT
    reduction_factor: Positive | None = Field(
        default=None,
        description="a number above 0: how many times narrower than the hidden size, or null for 16, for parallel 2",
    )
    size: Count | None = Field(
        default=None, description="a whole number of at least 1: the width itself, or null for reduction_factor"
    )
    non_linearity: Literal["relu", "swish", "gelu", "tanh"] | None = Field(
        default=None, description="relu, swish, gelu, tanh, or null for swish with houlsby and relu with others"
    )
    scaling: Positive | None = Field(
        default=None,
        description="a number above 0: factor of what is added, or null for 4 with parallel, else 1",
    )
    init: Literal["zero", "normal", "random"] = Field(
        default="zero", description="zero, normal or random: no effect at first, a small one, or a large one"
    )

    @field_validator("size")
    @classmethod
    def _one_width(cls, size: int | None, info: ValidationInfo) -> int | None:
        if size is not None and info.data.get("reduction_factor") is not None:
            raise ValueError("null where adapter.bottleneck.reduction_factor is given: both say how wide it is")
        return size


class PrefixSettings(BaseModel):
    """Virtual keys and values before those of the tokens, in every attention."""

    model_config = STRICT
    virtual_tokens: Count = Field(default=20, description="a whole number of at least 1: length of the prefix")
    init: Literal["random", "zero"] = Field(
        default="random", description="random or zero: normal numbers, or keys and values of nothing but zeros"
    )


class PromptSettings(BaseModel):
    """Virtual tokens before the others."""

    model_config = STRICT
    virtual_tokens: Count = Field(default=20, description="a whole number of at least 1: length of the prompt")
    init: Literal["random", "vocabulary", "text"] = Field(
        default="vocabulary",
        description="random, vocabulary or text: normal numbers, embeddings of drawn tokens, or of a text's",
    )
    text: Annotated[Text | None, Field(validate_default=True)] = Field(
        default=None, description="a text to begin with where init is text, else null"
    )

    @field_validator("text")
    @classmethod
    def _is_used(cls, text: str | None, info: ValidationInfo) -> str | None:
        if (info.data.get("init") == "text") != (text is not None):
            raise ValueError("a text where adapter.prompt.init is text, and null where it is not")
        return text


class AdaloraSettings(BaseModel):
    """How AdaLoRA's ranks move: adapter.r is the mean rank that is left. Phases are fractions of all steps."""

    model_config = STRICT
    initial_rank: Count | None = Field(
        default=None, description="a whole number of at least adapter.r: every rank at the start, or null for 1.5 r"
    )
    warmup: Share = Field(default=0.1, description="a fraction from 0 to below 1: training before any rank closes")
    final: Share = Field(
        default=0.4, description="a fraction from 0 to below 1: training with the final ranks, at the end"
    )
    interval: Count = Field(default=10, description="a whole number of at least 1: steps between two choices of ranks")
    orthogonality: Weight = Field(
        default=0.1, description="a number of at least 0: weight of the penalty that keeps A and B orthogonal"
    )

    @field_validator("final")
    @classmethod
    def _ranks_have_time_to_close(cls, final: float, info: ValidationInfo) -> float:
        warmup = info.data.get("warmup")
        if warmup is not None and warmup + final >= 1:
            raise ValueError(f"warmup + final below 1, they are {warmup:g} + {final:g}: ranks close between them")
        return final


class TopLayerSettings(BaseModel):
    """Which blocks top-layer fine-tuning trains besides the head."""

    model_config = STRICT
    layers: Count = Field(default=1, description="a whole number of at least 1: blocks, counted from the top")


class Nf4Settings(BaseModel):
    """How a base in 4-bit NormalFloat is held."""

    model_config = STRICT
    double_quantization: bool = Field(default=True, description="true or false: hold the scales of blocks in 8 bits")
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="float32, bfloat16, or null for training.precision: what products are computed in"
    )
