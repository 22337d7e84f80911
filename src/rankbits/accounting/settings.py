"""How a training run is set up, as far as its memory depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rankbits.errors import ModelError

Precision = Literal["fp32", "bf16"]
Base = Literal["fp32", "bf16", "fp16", "nf4", "nf4-double"]
Optimizer = Literal["adamw", "adamw-8bit", "paged-adamw-8bit"]
Kernel = Literal["eager", "sdpa"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """What decides the memory of a training run besides model and method.

    Args:
        batch: sequences of one forward pass.
        sequence_length: tokens of each, padding included.
        precision: of activations: "fp32", or "bf16" under autocast or throughout.
        base: how the pre-trained weights are held; what a method trains in full is never 4-bit.
        optimizer: "adamw" with two states of the trained weight's own width, or bitsandbytes' 8-bit states.
        checkpointing: keep only the input of each block and run the block again in the backward pass.
        attention: transformers' implementation, "sdpa" or "eager".
        dropout: whether the model was published with dropout; None: encoders and models of two stacks are, decoders
            are not. On a CPU each dropout keeps its noise in full width, and drops sdpa to its unfused kernel.
        master_weights: fp32 copies of trained half-precision weights, with fp32 states.
        device: "cpu" or "cuda".
        compiled: whether the quantizers of Bayesian-LoRA are fused by torch.compile (they are, unless
            RANKBITS_COMPILE=0 or there is no compiler).
        fixed_mmap_threshold: whether glibc was told not to keep freed blocks (MALLOC_MMAP_THRESHOLD_ is set).

    Raises:
        ModelError: a number below 1, or an unknown choice.
    """

    batch: int
    sequence_length: int
    precision: Precision = "fp32"
    base: Base = "fp32"
    optimizer: Optimizer = "adamw"
    checkpointing: bool = False
    attention: Kernel = "sdpa"
    dropout: bool | None = None
    master_weights: bool = False
    device: Device = "cpu"
    compiled: bool = True
    fixed_mmap_threshold: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "sequence_length"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name}: given {getattr(self, name)}, expected at least 1")
        closed = {"precision": Precision, "base": Base, "optimizer": Optimizer, "attention": Kernel, "device": Device}
        for name, choices in closed.items():
            if getattr(self, name) not in get_args(choices):
                raise ModelError(
                    f"{name}: given {getattr(self, name)!r}, expected one of {', '.join(get_args(choices))}"
                )

    @property
    def tokens(self) -> int:
        """Rows of one forward pass."""
        return self.batch * self.sequence_length

    @property
    def activation_bytes(self) -> int:
        """Bytes of one element of an activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def autocast(self) -> bool:
        """Whether products run in half precision on weights held in fp32: each is copied for its product."""
        return self.precision == "bf16" and self.base == "fp32"

    @property
    def half_throughout(self) -> bool:
        """Whether the base is in half precision, beside which adapters stay in fp32 and read inputs cast to it."""
        return self.precision == "bf16" and self.base in {"bf16", "fp16"}

    @property
    def base_bytes(self) -> int:
        """Bytes of one pre-trained weight that is not quantized; beside 4-bit weights it has the compute precision."""
        if self.base in {"nf4", "nf4-double"}:
            return self.activation_bytes
        return 4 if self.base == "fp32" else 2
