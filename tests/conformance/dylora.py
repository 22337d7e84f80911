"""The modes of DyLoRA that PEFT's tests run over: both merge, and both can do all that upstream asks for."""

from __future__ import annotations

import cases

from rankbits import DyloraConfig

# The smallest layer of upstream's models has two outputs; its learning rates are made for a scale of one.
SMALL = {"r": 2, "alpha": 2}
LARGE = {"r": 4, "alpha": 64}
CONV1D = {"r": 1, "alpha": 1}

FULL_RANK = cases.Method(DyloraConfig, SMALL, conv1d=CONV1D, quantized=LARGE)
CHOSEN_RANK = cases.Method(
    DyloraConfig,
    {**SMALL, "train_mode": "prefix", "evaluation_rank": 1},
    decoder={"r": 4, "evaluation_rank": 3},
    conv1d=CONV1D,
    quantized={**LARGE, "evaluation_rank": 3},
)
