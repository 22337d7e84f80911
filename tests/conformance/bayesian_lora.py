"""The modes of Bayesian-LoRA that PEFT's tests run over, and what upstream demands that the method cannot give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cases
import harness

from rankbits import BayesianLoraConfig

ACTIVATIONS = frozenset({"down_output", "diagonal_output", "output", "input"})
"""A quantizer on one of these cannot be written into a weight."""
# The smallest layer of upstream's models has two outputs; its learning rates are made for a scale of one.
SMALL = {"r": 2, "alpha": 2}
LARGE = {"r": 4, "alpha": 64}
# An upstream test compares the gradients of two passes: gates open in every sample, and calibration goes on in both.
DECODER = {"r": 4, "initial_bit_logit": 20.0, "calibration_passes": 50}
CONV1D = {"r": 1, "alpha": 1, "learn_rank": False}

FLOAT32 = "gates and ranges are float32 whatever the dtype of the base model"
IDLE = "a gate that is open, or whose quantizer still calibrates, gets no gradient from the data"
OVERFLOW = "plain SGD at a rate of 0.5 drives the logarithm of an output's range to infinity"
ONE_ACTIVE = "two adapters with quantizers on one layer would quantize its weight twice"

STAYS_FLOAT32 = {"decoder": {"test_add_adapter_no_autocast_adapter_dtype": FLOAT32}}
AUTOCAST = {"custom": {"test_adapter_dtype_autocast": {"autocast_adapter_dtype": [True]}}}
LEARNED_BITS: dict[str, dict[str, str]] = {
    "custom": {"test_only_params_are_updated": IDLE, "test_active_adapter": ONE_ACTIVE},
    "decoder": {**STAYS_FLOAT32["decoder"], "test_merge_layers_multi": ONE_ACTIVE},
}

RANK_ONLY = cases.Method(
    BayesianLoraConfig,
    {**SMALL, "learn_bits": False},
    conv1d=CONV1D,
    quantized=LARGE,
    drop=STAYS_FLOAT32,
    narrow=AUTOCAST,
)
WEIGHT_BITS = cases.Method(
    BayesianLoraConfig,
    {**SMALL, "quantizers": ["weight", "down", "diagonal", "up"], "calibration_passes": 0},
    decoder=DECODER,
    conv1d=CONV1D,
    quantized=LARGE,
    both_active=False,
    drop=LEARNED_BITS,
    narrow=AUTOCAST,
)
ALL_ON = cases.Method(
    BayesianLoraConfig,
    {**SMALL, "calibration_passes": 1},
    decoder=DECODER,
    conv1d=CONV1D,
    quantized=LARGE,
    both_active=False,
    drop={
        "custom": {**LEARNED_BITS["custom"], "test_parameters_after_loading_model": OVERFLOW},
        "decoder": LEARNED_BITS["decoder"],
        "quantization": {"test_merge_unmerge_unload": cases.REFUSED},
    },
    narrow=AUTOCAST,
)
ATTENTION = cases.Method(
    BayesianLoraConfig,
    {**SMALL, "quantizers": ["weight"], "quantize_attention": True},
    decoder={**DECODER, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    both_active=False,
    drop=LEARNED_BITS,
)
"""Only decoders have attention."""


def refuses(config_class: type, kwargs: Mapping[str, Any]) -> bool:
    """Whether the method refuses to merge an adapter with this config."""
    if config_class is not BayesianLoraConfig or not kwargs.get("learn_bits", True):
        return False
    quantized = kwargs.get("quantizers") or ACTIVATIONS
    return bool(kwargs.get("quantize_attention")) or not ACTIVATIONS.isdisjoint(quantized)


harness.skip_merging(refuses, cases.REFUSED)
