"""What processes that train one model have to agree on beside the gradients that a data-parallel wrapper averages."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from rankbits.quant.company import has_company


class Reduction(str, Enum):
    """How numbers of several processes become one."""

    MEAN = "mean"
    MAXIMUM = "maximum"


@torch.no_grad()
def agree(tensors: Sequence[Tensor], reduction: Reduction) -> None:
    """Reduce tensors in place over all processes, in one exchange for each device; nothing happens in a single one.

    Args:
        tensors: float32, of the same shapes and in the same order everywhere.
        reduction: how.
    """
    if not has_company():
        return
    operation = torch.distributed.ReduceOp.MAX if reduction is Reduction.MAXIMUM else torch.distributed.ReduceOp.SUM
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        some = [tensor for tensor in tensors if tensor.device == device]
        together = torch.cat([tensor.detach().reshape(-1) for tensor in some])
        torch.distributed.all_reduce(together, op=operation)
        if reduction is Reduction.MEAN:
            together /= torch.distributed.get_world_size()
        for tensor, part in zip(some, together.split([tensor.numel() for tensor in some]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))
