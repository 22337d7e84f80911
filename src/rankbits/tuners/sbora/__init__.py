"""SBoRA: low-rank adaptation whose other matrix is one-hot, so that it trains chosen rows or columns of a weight."""

from rankbits.tuners.sbora.allocate import allocate
from rankbits.tuners.sbora.config import SboraConfig, Variant, task_configs
from rankbits.tuners.sbora.layer import SboraLinear
from rankbits.tuners.sbora.model import SboraModel, sbora_layers

__all__ = ["SboraConfig", "SboraLinear", "SboraModel", "Variant", "allocate", "sbora_layers", "task_configs"]
