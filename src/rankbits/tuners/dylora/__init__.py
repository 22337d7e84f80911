"""DyLoRA: low-rank adaptation trained so that every smaller rank works as well."""

from rankbits.tuners.dylora.config import DyloraConfig, TrainMode
from rankbits.tuners.dylora.layer import DyloraLinear
from rankbits.tuners.dylora.model import DyloraModel
from rankbits.tuners.dylora.rank import adapted_layers, set_rank

__all__ = ["DyloraConfig", "DyloraLinear", "DyloraModel", "TrainMode", "adapted_layers", "set_rank"]
