"""Memory by rules of thumb, as lectures and blog posts work it out for LLaMA-3-8B, and where their arithmetic is loose.

The rules count bytes per parameter and forget activations, logits, scales and what stays unquantized;
`training_memory` counts those too.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9
"""These sums are in decimal gigabytes."""
LLAMA3_8B = 8_000_000_000
"""The round number of parameters that the sums use; there are 8,030,261,248."""


@dataclass(frozen=True, slots=True)
class BytesPerParameter:
    """What one trained parameter takes: its weight, its gradient and its optimizer states."""

    weight: float
    gradient: float
    states: float

    @property
    def total(self) -> float:
        """Bytes of all of it."""
        return self.weight + self.gradient + self.states


MIXED_ADAM = BytesPerParameter(weight=2, gradient=2, states=12)
"""A half-precision weight and gradient; an fp32 copy of the weight and two fp32 states of Adam."""
ADAPTER_RULE = BytesPerParameter(weight=0.5 + 2, gradient=4, states=2)
"""The rule for an adapter: half a byte of base weight, a half-precision weight, an fp32 gradient, 8-bit states."""


def loading_bytes(parameters: int, bytes_per_parameter: float = 4) -> int:
    """Bytes of the weights alone: 32 GB for 8 billion parameters in fp32, 4 GB in 4 bits without scales."""
    return round(parameters * bytes_per_parameter)


def full_finetuning_bytes(parameters: int, per_parameter: BytesPerParameter = MIXED_ADAM) -> int:
    """Weights, gradients and states when all is trained: 16 bytes a parameter, 128 GB for 8 billion."""
    return round(parameters * per_parameter.total)


def qlora_bytes(parameters: int, trained: int, per_parameter: BytesPerParameter = ADAPTER_RULE) -> int:
    """A 4-bit base and its adapters: 4 GB + 48 million times 8.5 bytes = 4.408 GB for 8 billion parameters."""
    return loading_bytes(parameters, 0.5) + round(trained * per_parameter.total)


LOOSE = (
    "Full fine-tuning is said to use 8-bit Adam, but 12 bytes of states are fp32 Adam with an fp32 copy of the weight: "
    "8-bit states are 2 bytes and a little for scales, which makes 6 bytes a parameter, 48 GB.",
    "The 4-bit base is counted at 0.5 byte a weight. NF4 is 4.5 bits with fp32 scales and 4.127 with double "
    "quantization, and token table, head and norms are not quantized: 1.05 of 8.03 billion weights stay in 16 bits.",
    "The 8.5 bytes of a trained parameter hold half a byte of base weight, which the 4 GB already have.",
    "The 2 bytes of 'AdamW states' are those of 8-bit Adam; fp32 AdamW has 8, and PEFT keeps the adapter itself in "
    "fp32 (4 bytes, not 2).",
    "4 GB and 0.408 GB are 4.408 GB, not the 4.1 GB that is printed.",
    "14 GB is called an upper bound for inference in half precision, but 8 billion parameters of 2 bytes are 16 GB "
    "before any activation.",
    "The 14 GB are said to hold the 32-bit model for inference; that is 32 GB.",
    "70 billion parameters in fp32 are 280 GB, not 820 GB.",
    "No sum counts activations or logits. At 2,048 tokens the loss over 128,256 words alone takes 3.15 GB.",
)
"""Where the worked examples do not add up, one sentence each."""
