"""Models with DyLoRA adapters whose update is not zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

from rankbits import DyloraConfig


@pytest.fixture
def dylora() -> Callable[..., PeftModel]:
    def attach(model: nn.Module, **settings: Any) -> PeftModel:
        chosen: dict[str, Any] = {"r": 4, "alpha": 6.0, "init_weights": False} | settings
        return get_peft_model(model, DyloraConfig(**chosen))

    return attach
