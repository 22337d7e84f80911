"""Tiny models with adapters, and the formulas of the paper written once more, for the tests of the tuners."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from rankbits import BayesianLoraConfig, GateSchedule
from rankbits.tuners.bayesian_lora import adapted_layers

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "tiny"))


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
def bert() -> BertForSequenceClassification:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "input_ids": torch.randint(0, 100, (4, 8), generator=generator),
        "labels": torch.tensor([0, 1, 1, 0]),
    }


@pytest.fixture
def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def adapt() -> Callable[..., PeftModel]:
    """Attach adapters with a start at which the update is not zero and quantizers calibrate after one pass."""

    def attach(model: nn.Module, **settings: Any) -> PeftModel:
        chosen: dict[str, Any] = {"r": 4, "init_weights": False, "calibration_passes": 1} | settings
        return get_peft_model(model, BayesianLoraConfig(**chosen))

    return attach


@pytest.fixture
def learn() -> Callable[..., None]:
    """Bring a model to where training leaves it: calibrated, its schedule stepped, its gates somewhere."""

    def train(model: nn.Module, *inputs: Any, rank: int | None = None, widths: bool = True, **kwargs: Any) -> None:
        model.train()
        for _ in range(3):
            model(*inputs, **kwargs)
        GateSchedule(model, 100).step()
        for index, (_, layer) in enumerate(adapted_layers(model)):
            for name in layer.active_adapters:
                gates = layer.gates_of(name)
                if gates is None:
                    continue
                if widths and gates.bit_logits is not None:
                    with torch.no_grad():
                        for row, logits in enumerate(gates.bit_logits):
                            logits[(index + row) % 4 :] = -3.0
                if rank is not None and gates.rank_logits is not None:
                    with torch.no_grad():
                        gates.rank_logits[rank - 1 :] = -5.0
        model.eval()

    return train


def _soft(x: Tensor, beta: Tensor, gates: Tensor, *, signed: bool = True) -> Tensor:
    step = 2 * beta / 3 if signed else beta / 3
    low = -beta if signed else torch.zeros_like(beta)
    clipped = torch.minimum(torch.maximum(x, low), beta)
    sum_of_parts = step * torch.round(clipped / step).clamp(-1 if signed else 0, 1 if signed else 3)
    result, chain = sum_of_parts, torch.ones((), dtype=x.dtype)
    for gate, divisor, bound in zip(gates, (5, 17, 257, 65537), (2, 8, 128, 32768), strict=True):
        step = step / divisor
        residual = step * torch.round((clipped - sum_of_parts) / step).clamp(-bound, bound)
        sum_of_parts = sum_of_parts + residual
        chain = chain * gate.to(x.dtype)
        result = result + chain * residual
    return result


def _hard(x: Tensor, beta: Tensor, bits: int, *, signed: bool = True) -> Tensor:
    low = -beta if signed else torch.zeros_like(beta)
    if bits == 32:
        return torch.minimum(torch.maximum(x, low), beta)
    step = (2 * beta if signed else beta) / (2**bits - 1)
    return step * torch.round(x / step).clamp(
        -(2 ** (bits - 1) - 1) if signed else 0, 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    )


def _hard_concrete(logits: Tensor, noise: Tensor) -> Tensor:
    stretched = torch.sigmoid((noise.log() - (1 - noise).log() + logits) * 1.5) * 1.2 - 0.1
    return stretched.clamp(0, 1)


def _layer_output(
    x: Tensor, w: SimpleNamespace, rank_gates: Tensor, quantize: Callable[[str, Tensor], Tensor]
) -> Tensor:
    """Alg. 1 with dense matrices; `w` holds weight [out, in], bias, A, E, B and the scale."""
    x = quantize("input", x)
    full = quantize("weight", w.weight)
    a, e, b = quantize("down", w.A), quantize("diagonal", w.E), quantize("up", w.B)
    hidden = quantize("down_output", x @ a.T)
    hidden = quantize("diagonal_output", hidden @ torch.diag(e * rank_gates))
    return quantize("output", x @ full.T + w.bias + w.scale * (hidden @ b.T))


@pytest.fixture
def paper() -> SimpleNamespace:
    """The formulas: soft and hard quantizer, hard concrete gate, output of a layer."""
    return SimpleNamespace(soft=_soft, hard=_hard, hard_concrete=_hard_concrete, layer_output=_layer_output)
