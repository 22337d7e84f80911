"""The methods and embedded models that a recipe can name, in words: nothing here loads or trains anything."""

from __future__ import annotations

from dataclasses import dataclass

from rankbits.embedded import MINILM, SMOLLM2, EmbeddedFile

NF4 = "nf4"
"""The section of methods whose base is held in 4 bits."""
NEITHER = "neither: rank and precision stay as given"
EXACT_LORA = "lora (exact), merged"
ONTO_4_BITS = "approximately: the sum is rounded to 4 bits again"


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        name: what recipes call it.
        trains: what receives gradients.
        learns: what it learns about precision and rank.
        merges: whether what was trained can become part of the base weights: exactly, approximately or no.
        exports: what other tools can be given: a LoRA adapter of PEFT, merged weights, or neither.
        paper: where it is from.
        sections: the sections of `adapter` that are its own settings; those of other methods mean nothing to it.
    """

    name: str
    trains: str
    learns: str
    merges: str
    exports: str
    paper: str
    sections: tuple[str, ...] = ()

    @property
    def four_bit(self) -> bool:
        """Whether the base is held in 4 bits."""
        return NF4 in self.sections


@dataclass(frozen=True)
class EmbeddedModel:
    """A pre-trained model that comes out of a pinned package instead of a hub.

    Args:
        name: what recipes call it.
        description: one line for listings.
        file: its weights.
        shape: the published shape with its sizes, where no config lies beside the weights.
    """

    name: str
    description: str
    file: EmbeddedFile
    shape: str | None = None


METHODS: tuple[Method, ...] = (
    Method(
        name="bayesian-lora",
        trains="a gated low-rank update beside quantized, frozen weights",
        learns="rank of every update, bits of every tensor",
        merges="exactly with adapter.placement=merged or where no activation is quantized, else no",
        exports="merged; lora (exact) where nothing is quantized",
        paper="Bayesian-LoRA, ICLR 2025 submission 13711",
    ),
    Method(
        name="lora",
        trains="a low-rank update beside frozen weights (PEFT's LoRA)",
        learns=NEITHER,
        merges="exactly",
        exports=EXACT_LORA,
        paper="Hu et al. 2022, LoRA",
    ),
    Method(
        name="rslora",
        trains="LoRA's update, scaled by alpha / sqrt(r) (PEFT)",
        learns=NEITHER,
        merges="exactly",
        exports=EXACT_LORA,
        paper="Kalajdzievski 2023, rank-stabilized LoRA",
    ),
    Method(
        name="dora",
        trains="LoRA's update and one magnitude for every output (PEFT)",
        learns=NEITHER,
        merges="exactly",
        exports="merged",
        paper="Liu et al. 2024, DoRA",
    ),
    Method(
        name="qlora",
        trains="LoRA's update beside weights in 4 bits (PEFT and bitsandbytes)",
        learns=NEITHER,
        merges=ONTO_4_BITS,
        exports="lora (exact)",
        paper="Dettmers et al. 2023, QLoRA",
        sections=(NF4,),
    ),
    Method(
        name="qdora",
        trains="DoRA's update and magnitudes beside weights in 4 bits (PEFT and bitsandbytes)",
        learns=NEITHER,
        merges=ONTO_4_BITS,
        exports="no",
        paper="Liu et al. 2024, DoRA; Dettmers et al. 2023, QLoRA",
        sections=(NF4,),
    ),
    Method(
        name="mora",
        trains="one square matrix per layer, with as many numbers as LoRA's pair",
        learns=NEITHER,
        merges="exactly",
        exports="lora (exact, not of the types decoupling and rotation), merged",
        paper="Jiang et al. 2024, MoRA",
        sections=("mora",),
    ),
    Method(
        name="sbora-fa",
        trains="r columns of every weight, drawn at random: LoRA with a one-hot A",
        learns=NEITHER,
        merges="exactly",
        exports=EXACT_LORA,
        paper="Po et al. 2024, SBoRA",
        sections=("sbora",),
    ),
    Method(
        name="sbora-fb",
        trains="r rows of every weight, drawn at random: LoRA with a one-hot B",
        learns=NEITHER,
        merges="exactly",
        exports=EXACT_LORA,
        paper="Po et al. 2024, SBoRA",
        sections=("sbora",),
    ),
    Method(
        name="qsbora",
        trains="r columns or rows of every weight (adapter.sbora.variant), beside weights in 4 bits",
        learns=NEITHER,
        merges=ONTO_4_BITS,
        exports="lora (exact)",
        paper="Po et al. 2024, SBoRA; Dettmers et al. 2023, QLoRA",
        sections=("sbora", NF4),
    ),
    Method(
        name="multi-sbora",
        trains="r columns or rows of every weight that no other task of the base has (adapter.sbora.first)",
        learns=NEITHER,
        merges="exactly, several tasks together; each comes out again by itself, bit for bit",
        exports=EXACT_LORA,
        paper="Po et al. 2024, SBoRA",
        sections=("sbora",),
    ),
    Method(
        name="dylora",
        trains="LoRA's update at a rank that is drawn anew for every step",
        learns="neither, but every rank up to r can be chosen afterwards",
        merges="exactly, at the chosen rank",
        exports=EXACT_LORA,
        paper="Valipour et al. 2022, DyLoRA",
        sections=("dylora",),
    ),
    Method(
        name="adalora",
        trains="an update in the form of a singular value decomposition, beside frozen weights (PEFT)",
        learns="which of all layers' ranks are left when their number has fallen to a given mean",
        merges="exactly",
        exports="merged",
        paper="Zhang et al. 2023, AdaLoRA",
        sections=("adalora",),
    ),
    Method(
        name="houlsby",
        trains="bottlenecks where attention and feed-forward end",
        learns=NEITHER,
        merges="no",
        exports="no",
        paper="Houlsby et al. 2019, adapters",
        sections=("bottleneck",),
    ),
    Method(
        name="pfeiffer",
        trains="bottlenecks where the feed-forward ends, behind the residual",
        learns=NEITHER,
        merges="no",
        exports="no",
        paper="Pfeiffer et al. 2021, AdapterFusion",
        sections=("bottleneck",),
    ),
    Method(
        name="parallel",
        trains="bottlenecks beside the feed-forward",
        learns=NEITHER,
        merges="no",
        exports="no",
        paper="He et al. 2022, a unified view of parameter-efficient transfer learning",
        sections=("bottleneck",),
    ),
    Method(
        name="prefix",
        trains="virtual keys and values in every attention (PEFT)",
        learns=NEITHER,
        merges="no",
        exports="no",
        paper="Li and Liang 2021, prefix-tuning",
        sections=("prefix",),
    ),
    Method(
        name="prompt",
        trains="virtual tokens before the others (PEFT)",
        learns=NEITHER,
        merges="no",
        exports="no",
        paper="Lester et al. 2021, prompt tuning",
        sections=("prompt",),
    ),
    Method(
        name="full",
        trains="all weights of the model",
        learns=NEITHER,
        merges="exactly: it is the model",
        exports="merged",
        paper="Devlin et al. 2019, BERT",
    ),
    Method(
        name="top-layer",
        trains="the last blocks and the head",
        learns=NEITHER,
        merges="exactly: it is the model",
        exports="merged",
        paper="Houlsby et al. 2019, adapters (their second baseline)",
        sections=("top_layer",),
    ),
    Method(
        name="feature-based",
        trains="the head alone, on features of the frozen model",
        learns=NEITHER,
        merges="exactly: it is the model",
        exports="merged",
        paper="Devlin et al. 2019, BERT, section 5.3",
    ),
)

EMBEDDED_MODELS: tuple[EmbeddedModel, ...] = (
    EmbeddedModel(
        name="minilm",
        description="all-MiniLM-L6-v2, an encoder (BERT, 6 layers, width 384, 22.7M parameters), Apache-2.0",
        file=MINILM,
    ),
    EmbeddedModel(
        name="smollm2",
        description=(
            "SmolLM2-135M-Instruct, a decoder (Llama, 30 layers, width 576, 134.5M parameters; read out of a file that "
            "holds its weights in 4 bits, for which rankbits[gguf] is needed), Apache-2.0"
        ),
        file=SMOLLM2,
        shape="smollm2-135m",
    ),
)

OTHER_MODELS = "any Hugging Face hub id (microsoft/deberta-v3-base) or local folder that holds a saved model"


def method_names() -> list[str]:
    """Names that the key `method` of a recipe accepts."""
    return [method.name for method in METHODS]


def method(name: str) -> Method:
    """The method that recipes call so. KeyError if there is none."""
    return {known.name: known for known in METHODS}[name]
