"""The DyLoRA tuner: what PEFT calls to put adapters into a model, and to take them out."""

from __future__ import annotations

from rankbits.tuners.dylora.layer import DyloraLinear
from rankbits.tuners.linear import LinearTuner


class DyloraModel(LinearTuner):
    """A model with DyLoRA adapters in its linear layers; made by `peft.get_peft_model`."""

    prefix = "dylora_"
    layer_class = DyloraLinear
    tuner_layer_cls = DyloraLinear
