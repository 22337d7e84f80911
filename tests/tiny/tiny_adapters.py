"""A configuration of every method with an exact plain LoRA, and what must not change when such a model is exported."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from rankbits import BayesianLoraConfig, DyloraConfig, MoraConfig, SboraConfig


def configs() -> dict[str, PeftConfig]:
    """A configuration of every method that has an exact plain LoRA, with a start at which the update is not zero."""
    common: dict[str, Any] = {"target_modules": ["0", "2"], "init_weights": False}
    kinds = ("truncation", "sharing", "sharing_adjacent", "sharing_adjacent_inputs", "sharing_adjacent_outputs")
    return {
        "dylora": DyloraConfig(r=4, alpha=5.0, evaluation_rank=3, dropout=0.5, **common),
        "sbora fa": SboraConfig(r=3, alpha=5.0, variant="fa", **common),
        "sbora fb": SboraConfig(r=3, alpha=5.0, variant="fb", **common),
        "bayesian-lora": BayesianLoraConfig(r=4, alpha=5.0, learn_bits=False, **common),
        "bayesian-lora, ranks given": BayesianLoraConfig(r=4, learn_bits=False, learn_rank=False, **common),
        "lora": LoraConfig(r=4, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=False),
    } | {f"mora {kind}": MoraConfig(r=2, mora_type=kind, **common) for kind in kinds}


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that an export could disturb: numbers, where they are stored, modes, and what needs a gradient."""
    numbers = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()]
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    return numbers, places, modules


def unchanged(before: tuple[Any, ...], model: nn.Module) -> bool:
    after = snapshot(model)
    same = before[0].keys() == after[0].keys() and all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    return same and before[1:] == after[1:]
