"""The kinds of bottleneck adapters that PEFT's tests run over, and what they cannot give: merging."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import cases
import harness
import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankbits import BottleneckConfig

# Upstream's Conv1D has one output, of which a start of 0.02 leaves a bottleneck hardly anything to learn from.
CONV1D = {"bottleneck_size": 4, "scaling": 16.0}
NEVER = {"quantization": {"test_merge_unmerge_unload": cases.REFUSED}}
# Where a decoder's feed-forward ends, and what stands in its adapters, is found and not given.
IN_DECODERS = {"bottleneck_size": 5, "feed_forward": None, "non_linearity": None}

HOULSBY = cases.Method(
    BottleneckConfig,
    decoder={"bottleneck_size": 5},
    quantized={"bottleneck_size": 5},
    conv1d=CONV1D,
    drop=NEVER,
)
PFEIFFER = cases.Method(
    BottleneckConfig,
    # The usual relu would leave some adapters in upstream's models without any effect.
    {
        "kind": "pfeiffer",
        "feed_forward": {"output": "fc2", "input": "fc1", "norm_before": "norm"},
        "non_linearity": "tanh",
    },
    targets=("lin0.fc2", "lin1.fc2"),
    saved="sm",
    decoder=IN_DECODERS,
    quantized={"target_modules": None, **IN_DECODERS},
    quantized_layers=1,
    conv1d={"bottleneck_size": 4, "target_modules": ["conv1d.fc2"]},
    drop=NEVER,
)
PARALLEL = cases.Method(
    BottleneckConfig,
    {"kind": "parallel", "non_linearity": "tanh", "scaling": 1.0},
    decoder={"bottleneck_size": 5},
    quantized={"bottleneck_size": 5},
    drop=NEVER,
)


def put_in_blocks(patch: pytest.MonkeyPatch) -> None:
    """Put feed-forwards where upstream's models have single layers, and a head behind the MLP's.

    An adapter of Pfeiffer's reads the residual sum of its block, which a layer alone does not have.
    """
    upstream = harness.upstream("test_custom_models")

    def mlp(self: Any, bias: bool = True) -> None:
        original_mlp(self, bias=bias)
        self.lin0, self.lin1 = (_feed_forward(nn.Linear(10, 20, bias), nn.Linear(20, 10, bias)) for _ in range(2))
        self.sm = nn.Sequential(nn.Linear(10, 2), self.sm)

    def embedding(self: Any, *args: Any, **kwargs: Any) -> None:
        original_embedding(self, *args, **kwargs)
        self.conv1d, self.lin0 = _feed_forward(Conv1D(8, 5), Conv1D(5, 8)), nn.Linear(50, 2)

    # The classes stay upstream's own, which their pickles name.
    original_mlp, original_embedding = upstream.MLP.__init__, upstream.ModelEmbConv1D.__init__
    patch.setattr(upstream.MLP, "__init__", mlp)
    patch.setattr(upstream.ModelEmbConv1D, "__init__", embedding)


def _feed_forward(fc1: nn.Module, fc2: nn.Module) -> nn.Module:
    width = fc1.weight.shape[0] if isinstance(fc1, Conv1D) else fc1.in_features
    return nn.Sequential(OrderedDict(norm=nn.LayerNorm(width), fc1=fc1, relu=nn.ReLU(), fc2=fc2))


def refuses(config_class: type, kwargs: Mapping[str, Any]) -> bool:
    """Whether the method refuses to merge an adapter with this config: always."""
    return config_class is BottleneckConfig


harness.skip_merging(refuses, cases.REFUSED)
