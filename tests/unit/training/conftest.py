"""Tiny adapted models for the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rankbits import BayesianLoraConfig, GateSchedule

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """PEFT still uses names that transformers has deprecated: not our doing."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(
                pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
            )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def step_that_leaves_no_trace() -> Callable[[GateSchedule, str], None]:
    """A step of a schedule, which must leave modes, hooks of layers and random numbers of its model as they were."""

    def step(schedule: GateSchedule, evaluated: str) -> None:
        schedule.model.get_submodule(evaluated).eval()
        inner = list(schedule.model.modules())[1:]  # the schedule's own hook is that of the whole model
        before = [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in inner]
        state = torch.get_rng_state()
        schedule.step()
        assert torch.equal(torch.get_rng_state(), state)
        assert [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in inner] == before

    return step


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def adapted() -> Callable[..., PeftModel]:
    """A two-layer model with adapters on both layers; the same one for the same settings."""

    def build(**settings: Any) -> PeftModel:
        torch.manual_seed(3)
        base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
        chosen: dict[str, Any] = {"r": 4, "target_modules": ["0", "2"], "init_weights": False, "calibration_passes": 1}
        return get_peft_model(base, BayesianLoraConfig(**(chosen | settings)))

    return build
