"""Bayesian-LoRA: low-rank adaptation that learns its ranks and bit widths."""

from rankbits.tuners.bayesian_lora.adapters import GatePhase
from rankbits.tuners.bayesian_lora.config import BayesianLoraConfig
from rankbits.tuners.bayesian_lora.find import GatedLayer, adapted_layers, gated_layers, learning_adapters
from rankbits.tuners.bayesian_lora.harden import harden
from rankbits.tuners.bayesian_lora.head import QuantizedHeadLinear, quantized_heads
from rankbits.tuners.bayesian_lora.layer import BayesianLoraLinear
from rankbits.tuners.bayesian_lora.model import BayesianLoraModel
from rankbits.tuners.bayesian_lora.summary import LayerSummary, summarize

__all__ = [
    "BayesianLoraConfig",
    "BayesianLoraLinear",
    "BayesianLoraModel",
    "GatePhase",
    "GatedLayer",
    "LayerSummary",
    "QuantizedHeadLinear",
    "adapted_layers",
    "gated_layers",
    "harden",
    "learning_adapters",
    "quantized_heads",
    "summarize",
]
