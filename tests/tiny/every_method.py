"""A configuration of every method of ours in each of its modes, and two tiny models of transformers to adapt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_models import BERT, LLAMA, live
from torch import Tensor, nn

from rankbits import BayesianLoraConfig, BottleneckConfig, DyloraConfig, MoraConfig, SboraConfig
from rankbits.accounting.architectures.read import Head
from rankbits.tuners.mora import MoraType

TARGETS = {"encoder": ["query", "value", "intermediate.dense"], "decoder": ["q_proj", "v_proj", "down_proj"]}
"""Square, wide and tall matrices, where a model has them."""
BOTTLENECKS = ("houlsby", "pfeiffer", "parallel")

Maker = Callable[..., PeftConfig]


def _on_linears(kind: type[PeftConfig], **settings: Any) -> Maker:
    return lambda model, **more: kind(target_modules=list(TARGETS[model]), **settings | more)  # type: ignore[call-arg]


def _bottleneck(kind: str) -> Maker:
    return lambda model, **more: BottleneckConfig(kind=kind, bottleneck_size=5, **more)


CONFIGS: dict[str, Maker] = {
    **{f"mora {kind.value}": _on_linears(MoraConfig, r=1, mora_type=kind.value) for kind in MoraType},
    **{f"sbora {variant}": _on_linears(SboraConfig, r=3, variant=variant) for variant in ("fa", "fb")},
    **{f"dylora {mode}": _on_linears(DyloraConfig, r=4, train_mode=mode) for mode in ("frozen", "prefix")},
    **{kind: _bottleneck(kind) for kind in BOTTLENECKS},
    "bayesian-lora q": _on_linears(BayesianLoraConfig, r=3, learn_rank=False, calibration_passes=1),
    "bayesian-lora ra": _on_linears(BayesianLoraConfig, r=3, learn_bits=False),
    "bayesian-lora q+ra": _on_linears(BayesianLoraConfig, r=3, calibration_passes=1),
    "bayesian-lora merged": _on_linears(BayesianLoraConfig, r=3, placement="merged", calibration_passes=1),
}
"""From "encoder" or "decoder", and further fields such as init_weights, to a configuration."""
UNMERGEABLE = (*BOTTLENECKS, "bayesian-lora q", "bayesian-lora q+ra")
"""No single weight computes what these do: a function that is not linear, or rounded activations."""


def base(model: str) -> nn.Module:
    """A tiny classifier ("encoder") or language model ("decoder"), with the same random weights whenever it is made."""
    torch.manual_seed(3)
    if model == "encoder":
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        made: nn.Module = live(BERT | {"model_type": "bert"} | still, Head.CLASSIFICATION)
    else:
        made = live(LLAMA, Head.LANGUAGE_MODEL)
    return made


def batch(model: str) -> dict[str, Tensor]:
    """Four rows with labels."""
    ids = torch.randint(2, 30, (4, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 0]) if model == "encoder" else ids}


def adapted(model: str, method: str, *, dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """A tiny model with one adapter, the same whenever it is made."""
    made = base(model).to(dtype)
    torch.manual_seed(4)
    return get_peft_model(made, CONFIGS[method](model, **settings))
