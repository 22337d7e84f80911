"""The kinds of bottleneck adapters that PEFT's tests run over, and what they cannot give: merging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cases
import harness

from rankbits import BottleneckConfig

# Upstream's Conv1D has one output, of which a start of 0.02 leaves a bottleneck hardly anything to learn from.
CONV1D = {"bottleneck_size": 4, "scaling": 16.0}
NEVER = {"quantization": {"test_merge_unmerge_unload": cases.REFUSED}}

HOULSBY = cases.Method(
    BottleneckConfig,
    decoder={"bottleneck_size": 5},
    quantized={"bottleneck_size": 5},
    conv1d=CONV1D,
    drop=NEVER,
)
PFEIFFER = cases.Method(
    BottleneckConfig,
    {"kind": "pfeiffer"},
    decoder={"bottleneck_size": 5},
    drop=NEVER,
)
PARALLEL = cases.Method(
    BottleneckConfig,
    {"kind": "parallel", "non_linearity": "tanh", "scaling": 1.0},
    decoder={"bottleneck_size": 5},
    quantized={"bottleneck_size": 5},
    drop=NEVER,
)


def refuses(config_class: type, kwargs: Mapping[str, Any]) -> bool:
    """Whether the method refuses to merge an adapter with this config: always."""
    return config_class is BottleneckConfig


harness.skip_merging(refuses, cases.REFUSED)
