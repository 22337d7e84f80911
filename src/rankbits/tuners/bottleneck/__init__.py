"""Bottleneck adapters: two small matrices and a non-linearity at the end of a transformer's sub-layers."""

from rankbits.tuners.bottleneck.config import BottleneckConfig, Kind, NonLinearity
from rankbits.tuners.bottleneck.layer import BottleneckLinear
from rankbits.tuners.bottleneck.model import BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLinear", "BottleneckModel", "Kind", "NonLinearity"]
