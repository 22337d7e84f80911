"""PEFT's own tests over bottleneck adapters; Pfeiffer's need a transformer block, which only the decoders have."""

from __future__ import annotations

import bottleneck_adapters
import cases
import harness
import pytest
from peft import get_peft_model

from rankbits.errors import MergeError

globals().update(cases.classes("Houlsby", bottleneck_adapters.HOULSBY))
globals().update(cases.classes("Parallel", bottleneck_adapters.PARALLEL))
TestPfeifferConfig = harness.conformance("config", cases.config(bottleneck_adapters.PFEIFFER))
TestPfeifferDecoder = harness.conformance("decoder", cases.decoder(bottleneck_adapters.PFEIFFER))


@pytest.mark.parametrize("mode", [bottleneck_adapters.HOULSBY, bottleneck_adapters.PARALLEL])
def test_merge_tests_are_skipped_exactly_where_the_method_refuses_to_merge(mode: cases.Method) -> None:
    kwargs = mode.row(target_modules=["lin0"])
    assert bottleneck_adapters.refuses(mode.config, kwargs)
    model = get_peft_model(harness.upstream("test_custom_models").MLP(), mode.config(**kwargs))
    with pytest.raises(MergeError):
        model.merge_adapter()
