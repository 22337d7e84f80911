"""Whether a process trains alone: ranges that are learned, or recorded, are shared among those that do not."""

from __future__ import annotations

import torch


def has_company() -> bool:
    """Whether other processes train the same model."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
