"""PEFT's own LoRA passes: what the harness reports about our tuners is about our tuners."""

from __future__ import annotations

import cases
from peft import LoraConfig

OWN_CLASSES = "LoRA has one class per quantized layer and sets no quantization_backend"
LORA = cases.Method(
    LoraConfig,
    decoder={"r": 8, "lora_alpha": 32},  # an upstream test writes out the ranks that follow from r = 8
    not_identity={"init_lora_weights": False},
    drop={"quantization": {"test_quantization_backend_is_set_and_repr": OWN_CLASSES}},
)

globals().update(cases.classes("Lora", LORA))
