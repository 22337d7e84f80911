"""The methods and embedded models that a recipe can name, in words: nothing here loads or trains anything."""

from __future__ import annotations

from dataclasses import dataclass

from rankbits.embedded import MINILM, SMOLLM2, EmbeddedFile


@dataclass(frozen=True)
class Method:
    """One way to fine-tune: what it trains and what it learns about precision and rank."""

    name: str
    trains: str
    learns: str
    paper: str


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
        paper="Bayesian-LoRA, ICLR 2025 submission 13711",
    ),
    Method(
        name="lora",
        trains="a low-rank update beside frozen weights (PEFT's LoRA)",
        learns="neither: rank and precision stay as given",
        paper="Hu et al. 2022, LoRA",
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
