"""SBoRA in tiny models, and what the paper says it computes, with the one-hot matrices written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rankbits import SboraConfig
from rankbits.tuners.sbora import SboraLinear, sbora_layers


@pytest.fixture
def pick() -> Callable[..., PeftModel]:
    """Attach adapters that do not start at zero."""

    def attach(model: nn.Module, **settings: Any) -> PeftModel:
        return get_peft_model(model, SboraConfig(**{"r": 3, "init_weights": False} | settings))

    return attach


@pytest.fixture
def dense_update() -> Callable[[SboraLinear, str], Tensor]:
    """(alpha / r) B A [out_features, in_features] in float64, with one-hot rows of A (FA) or columns of B (FB)."""

    def product(layer: SboraLinear, name: str) -> Tensor:
        indices = layer.indices_of(name)
        if name in layer.sbora_up:
            up = layer.sbora_up[name].detach().double()
            down = torch.eye(layer.in_features, dtype=torch.float64)[indices]
        else:
            down = layer.sbora_down[name].detach().double()
            up = torch.eye(layer.out_features, dtype=torch.float64)[indices].T
        return layer.scaling[name] * up @ down

    return product


@pytest.fixture
def only() -> Callable[[nn.Module], SboraLinear]:
    """The one SBoRA layer of a model."""

    def find(model: nn.Module) -> SboraLinear:
        ((_, layer),) = sbora_layers(model)
        return layer

    return find
