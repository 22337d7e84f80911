"""PEFT's own tests over bottleneck adapters; Pfeiffer's get feed-forwards to stand in where upstream has layers."""

from __future__ import annotations

from collections.abc import Iterator

import bottleneck_adapters
import cases
import harness
import pytest
from peft import get_peft_model

from rankbits.errors import MergeError

globals().update(cases.classes("Houlsby", bottleneck_adapters.HOULSBY))
globals().update(cases.classes("Parallel", bottleneck_adapters.PARALLEL))
PFEIFFER = cases.classes("Pfeiffer", bottleneck_adapters.PFEIFFER)
globals().update(PFEIFFER)


@pytest.fixture(autouse=True)
def blocks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Upstream's models with blocks in them, for Pfeiffer's adapters alone."""
    with pytest.MonkeyPatch.context() as patch:
        if request.cls in PFEIFFER.values():
            bottleneck_adapters.put_in_blocks(patch)
        yield


@pytest.mark.parametrize(
    "mode", [bottleneck_adapters.HOULSBY, bottleneck_adapters.PFEIFFER, bottleneck_adapters.PARALLEL]
)
def test_merge_tests_are_skipped_exactly_where_the_method_refuses_to_merge(
    mode: cases.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode is bottleneck_adapters.PFEIFFER:
        bottleneck_adapters.put_in_blocks(monkeypatch)
    kwargs = mode.row(target_modules=list(mode.targets))
    assert bottleneck_adapters.refuses(mode.config, kwargs)
    model = get_peft_model(harness.upstream("test_custom_models").MLP(), mode.config(**kwargs))
    with pytest.raises(MergeError):
        model.merge_adapter()
