"""The lecture's worked examples of memory beside the rules of thumb that they follow."""

from __future__ import annotations

from rankbits.accounting.published.cells import Row, Verdict, half_a_digit
from rankbits.accounting.rules_of_thumb import LLAMA3_8B, LOOSE, full_finetuning_bytes, loading_bytes, qlora_bytes
from rankbits.accounting.weights import nf4_bytes

TRAINED = 48_000_000
"""0.6 % of 8 billion parameters."""
LLAMA_65B = 65 * 10**9

HEADING = (
    "Rules of thumb in bytes per parameter, decimal gigabytes, as a lecture works them out. Where they are loose: "
)


def heading() -> str:
    """What the examples are, and every place where their arithmetic is loose."""
    return HEADING + " ".join(f"({number}) {sentence}" for number, sentence in enumerate(LOOSE, start=1))


def memory_rows() -> list[Row]:
    """Each worked example: what is printed, and what its own rule gives."""
    adapters = qlora_bytes(LLAMA3_8B, TRAINED) - qlora_bytes(LLAMA3_8B, 0)
    saved = nf4_bytes(LLAMA_65B) - nf4_bytes(LLAMA_65B, double=True)
    reproduced, misprint = Verdict.REPRODUCED, Verdict.MISPRINT
    return [
        _row("LLaMA-3-8B, fp32", "32GB", loading_bytes(LLAMA3_8B), reproduced, "8 billion times 4 bytes."),
        _row(
            "LLaMA-3-8B, full fine-tuning",
            "128GB",
            full_finetuning_bytes(LLAMA3_8B),
            reproduced,
            "16 bytes a parameter: weight 2, gradient 2, fp32 Adam with a copy of the weight 12; over 120 in the text.",
        ),
        _row(
            "LLaMA-3-8B, 4-bit base",
            "4GB",
            loading_bytes(LLAMA3_8B, 0.5),
            reproduced,
            "Half a byte a weight, no scales and nothing left in 16 bits.",
        ),
        _row("QLoRA, 48 M adapters", "0.408GB", adapters, reproduced, "8.5 bytes a parameter."),
        _row(
            "QLoRA, base and adapters",
            "4.1GB",
            qlora_bytes(LLAMA3_8B, TRAINED),
            misprint,
            "4 and 0.408 are 4.408.",
        ),
        _row(
            "QLoRA and inference in fp16",
            "14GB",
            loading_bytes(LLAMA3_8B, 2),
            Verdict.IRREPRODUCIBLE,
            "Called an upper bound, but the weights alone are 16 GB in half precision.",
        ),
        _row(
            "LLaMA-3-70B, fp32",
            "820GB",
            loading_bytes(70 * 10**9),
            misprint,
            "70 billion times 4 bytes are 280 GB.",
        ),
        _row(
            "65B, saved by double quantization",
            "3GB",
            saved,
            reproduced,
            "0.373 bits a weight: scales of 8 bits instead of 32 for each block of 64.",
        ),
    ]


def _row(cell: str, published: str, recomputed: int, verdict: Verdict, reason: str) -> Row:
    return Row(
        table="Lecture on parameter-efficient fine-tuning, worked examples",
        cell=cell,
        published=published,
        verdict=verdict,
        reason=reason,
        recomputed=recomputed,
        tolerance=half_a_digit(published),
    )
