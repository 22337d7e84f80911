"""Bayesian-LoRA: low-rank adaptation that learns its ranks and bit widths."""

from rankbits.tuners.bayesian_lora.adapters import GatePhase
from rankbits.tuners.bayesian_lora.config import BayesianLoraConfig
from rankbits.tuners.bayesian_lora.find import adapted_layers, learning_adapters
from rankbits.tuners.bayesian_lora.harden import harden
from rankbits.tuners.bayesian_lora.layer import BayesianLoraLinear
from rankbits.tuners.bayesian_lora.model import BayesianLoraModel
from rankbits.tuners.bayesian_lora.summary import LayerSummary, summarize

__all__ = [
    "BayesianLoraConfig",
    "BayesianLoraLinear",
    "BayesianLoraModel",
    "GatePhase",
    "LayerSummary",
    "adapted_layers",
    "harden",
    "learning_adapters",
    "summarize",
]
