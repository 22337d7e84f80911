"""The types of MoRA that PEFT's tests run over, and upstream's tiny models with layers that hold a square matrix."""

from __future__ import annotations

from typing import Any

import cases
import harness
import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankbits import MoraConfig

ROTATION = cases.Method(MoraConfig, {"r": 2, "mora_type": "rotation"}, conv1d={"r": 1})
# Upstream converts to a LoRA of rank 8 and bounds the loss: the side is 11 at r = 1, and 16 at r = 2.
SHARING = cases.Method(MoraConfig, {"r": 2, "mora_type": 1}, decoder={"r": 1}, conv1d={"r": 1})


def widen(patch: pytest.MonkeyPatch) -> None:
    """Give upstream's MLP eight outputs where it has two, and its Conv1D four where it has one.

    No square matrix of the size that even rank 1 asks for fits into upstream's layers, and MoRA refuses them.
    """
    upstream = harness.upstream("test_custom_models")

    def mlp(self: Any, bias: bool = True) -> None:
        original_mlp(self, bias=bias)
        self.lin1 = nn.Linear(20, 8, bias=bias)

    def embedding(self: Any, *args: Any, **kwargs: Any) -> None:
        original_embedding(self, *args, **kwargs)
        self.conv1d, self.lin0 = Conv1D(4, 5), nn.Linear(40, 2)

    # The classes stay upstream's own, which their pickles name.
    original_mlp, original_embedding = upstream.MLP.__init__, upstream.ModelEmbConv1D.__init__
    patch.setattr(upstream.MLP, "__init__", mlp)
    patch.setattr(upstream.ModelEmbConv1D, "__init__", embedding)
