"""MoRA: high-rank adaptation by one square matrix per layer."""

from rankbits.tuners.mora.config import MoraConfig
from rankbits.tuners.mora.layer import MoraLinear
from rankbits.tuners.mora.model import MoraModel
from rankbits.tuners.mora.update import MoraType

__all__ = ["MoraConfig", "MoraLinear", "MoraModel", "MoraType"]
