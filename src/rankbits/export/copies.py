"""A copy of a model's modules that shares its tensors: what is replaced in the copy is not replaced in the model."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def sharing_copy(model: Model, *, own: Collection[nn.Parameter] = ()) -> Model:
    """Copy modules, their attributes and hooks, but no numbers, so that a copy of a large model costs next to nothing.

    Each tensor becomes another object with the same storage: assigning to `.data`, freezing or replacing it leaves the
    model alone. Writing into one in place does not, and is for those alone that are listed in `own`.

    Args:
        model: which model.
        own: parameters of it whose numbers are copied, too.

    Returns:
        The copy; none of its parameters needs a gradient.
    """
    owned = {id(parameter) for parameter in own}
    memo = {}
    for tensor in (*model.parameters(), *model.buffers()):
        twin = (copy.deepcopy if id(tensor) in owned else copy.copy)(tensor)
        memo[id(tensor)] = twin.requires_grad_(False)
    return copy.deepcopy(model, memo)
