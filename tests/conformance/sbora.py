"""The modes of SBoRA that PEFT's tests run over, and what upstream does that disjoint adapters refuse."""

from __future__ import annotations

import cases

from rankbits import SboraConfig

# Upstream's layers have 10 inputs and 20 outputs, then 20 inputs and 2 outputs, with a ReLU between that is dead for
# nine of the 20; its Conv1D has 5 inputs and 1 output. With these seeds the inputs chosen of the second layer, and the
# outputs chosen of the first, are alive. Upstream's learning rates are made for a scale of one.
LIVE_INPUTS = {"r": 2, "alpha": 2, "seed": 3}
LIVE_OUTPUTS = {"r": 2, "alpha": 2, "seed": 0}
ONE = {"r": 1, "alpha": 1}
LARGE = {"r": 32, "alpha": 512}

TWICE = "the same disjoint adapter is loaded a second time beside itself, and its inputs are taken"

INPUTS = cases.Method(SboraConfig, {**LIVE_INPUTS, "variant": "fa"}, conv1d=ONE, quantized=LARGE)
OUTPUTS = cases.Method(SboraConfig, {**LIVE_OUTPUTS, "variant": "fb"}, conv1d=ONE, quantized=LARGE)
DISJOINT = cases.Method(
    SboraConfig,
    {**LIVE_INPUTS, "variant": "fa", "disjoint": True},
    conv1d=ONE,
    quantized=LARGE,
    drop={
        "custom": dict.fromkeys(["test_load_multiple_adapters", "test_load_model_low_cpu_mem_usage"], TWICE),
        "decoder": {"test_add_adapter_no_autocast_adapter_dtype": TWICE},
    },
)
