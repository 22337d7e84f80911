"""Small trained adapters of every method, on linear layers of both kinds, with another rank in each layer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from rankbits import BayesianLoraConfig, GateSchedule, harden
from rankbits.tuners.bayesian_lora import adapted_layers

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "tiny"))
# In a process where importing rankbits fails, as it does where it is not installed.
WITHOUT_RANKBITS = "import sys; sys.modules['rankbits'] = None\n"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """PEFT still uses names that transformers has deprecated: not our doing."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(
                pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
            )


def _base(kind: str) -> nn.Sequential:
    torch.manual_seed(1)
    if kind == "linear":
        return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 16)).eval()
    layers = nn.Sequential(Conv1D(10, 12), nn.Tanh(), Conv1D(16, 10)).eval()
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.weight, std=0.3)
    return layers


@pytest.fixture(scope="session")
def base() -> Callable[[str], nn.Sequential]:
    """Two adaptable layers, `nn.Linear` or transformers' `Conv1D`, the same at each call."""
    return _base


def _trained(model: nn.Module, config: PeftConfig) -> PeftModel:
    torch.manual_seed(2)
    if isinstance(config, LoraConfig) and isinstance(model[0], Conv1D):
        config.fan_in_fan_out = True
    adapted = get_peft_model(model, config)
    if isinstance(config, BayesianLoraConfig) and config.learns:
        GateSchedule(adapted, 10).step()
        with torch.no_grad():
            for index, (_, layer) in enumerate(adapted_layers(adapted)):
                layer.bayesian_lora_diagonal["default"].uniform_(-2, 2)
                layer.gates_of("default").rank_logits[1 + index :] = -5.0
        harden(adapted)
    return adapted.eval()


@pytest.fixture(scope="session")
def trained() -> Callable[[nn.Module, PeftConfig], PeftModel]:
    """Puts adapters into a model and leaves them as training would: not zero, and where ranks are learned, hardened."""
    return _trained


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(3))


def _without_rankbits(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RANKBITS + code],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def without_rankbits() -> Callable[[str, Path], None]:
    """Runs code in a process where rankbits cannot be imported."""
    return _without_rankbits


@pytest.fixture
def bert() -> BertForSequenceClassification:
    torch.manual_seed(4)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(5)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


@pytest.fixture
def ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(6))}
