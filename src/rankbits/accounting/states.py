"""Bytes of an optimizer's states, on the device and on the host."""

from __future__ import annotations

from collections.abc import Sequence

from rankbits.accounting.settings import TrainingSettings

FLOAT = 4
ADAM_BLOCK = 256
ADAM_8BIT_FROM = 4096
"""bitsandbytes keeps fp32 states for smaller tensors."""
PAGED_FROM = 100_000
"""bitsandbytes pages the states of tensors from this size on."""


def optimizer_bytes(sizes: Sequence[int], settings: TrainingSettings, *, weight_bytes: int = FLOAT) -> tuple[int, int]:
    """Bytes of Adam's states (Kingma and Ba 2015) on the device, and of those that may move to the host.

    Two states per parameter. AdamW keeps them in the weight's width: 8 bytes a parameter in fp32. In 8 bits (Dettmers
    et al. 2022) they are 2 bytes and two fp32 scales for each 256 parameters; tensors below 4096 elements keep fp32.
    Paging needs CUDA: on a CPU bitsandbytes does not page.

    Args:
        sizes: elements of each trained tensor.
        settings: optimizer and device.
        weight_bytes: bytes of one trained weight.
    """
    device = host = 0
    for size in sizes:
        if settings.optimizer == "adamw":
            width = FLOAT if settings.master_weights else weight_bytes
            device += 2 * size * width
        elif size < ADAM_8BIT_FROM:
            device += 2 * size * FLOAT
        else:
            states, scales = 2 * size, 2 * -(-size // ADAM_BLOCK) * FLOAT
            paged = settings.optimizer == "paged-adamw-8bit" and settings.device == "cuda" and size >= PAGED_FROM
            device += scales + (0 if paged else states)
            host += states if paged else 0
    masters = sum(sizes) * FLOAT if settings.master_weights and weight_bytes < FLOAT else 0
    return device + masters, host
