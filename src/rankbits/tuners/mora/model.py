"""The MoRA tuner: what PEFT calls to put adapters into a model, and to take them out."""

from __future__ import annotations

from rankbits.tuners.linear import LinearTuner
from rankbits.tuners.mora.layer import MoraLinear


class MoraModel(LinearTuner):
    """A model with MoRA adapters in its linear layers; made by `peft.get_peft_model`."""

    prefix = "mora_"
    layer_class = MoraLinear
    tuner_layer_cls = MoraLinear
