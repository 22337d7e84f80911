"""PEFT's own tests over Bayesian-LoRA: rank only, with quantized weights, with all on, and with quantized attention."""

from __future__ import annotations

import bayesian_lora
import cases
import harness
import pytest
from peft import get_peft_model

from rankbits.errors import MergeError

globals().update(cases.classes("RankOnly", bayesian_lora.RANK_ONLY))
globals().update(cases.classes("WeightBits", bayesian_lora.WEIGHT_BITS))
globals().update(cases.classes("AllOn", bayesian_lora.ALL_ON))
TestQuantizedAttentionDecoder = harness.conformance("decoder", cases.decoder(bayesian_lora.ATTENTION))


@pytest.mark.parametrize("mode", [bayesian_lora.RANK_ONLY, bayesian_lora.WEIGHT_BITS, bayesian_lora.ALL_ON])
def test_merge_tests_are_skipped_exactly_where_the_method_refuses_to_merge(mode: cases.Method) -> None:
    kwargs = mode.row(target_modules=["lin0"])
    model = get_peft_model(harness.upstream("test_custom_models").MLP(), mode.config(**kwargs))
    if bayesian_lora.refuses(mode.config, kwargs):
        with pytest.raises(MergeError):
            model.merge_adapter()
    else:
        model.merge_adapter()
