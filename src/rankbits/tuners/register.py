"""Makes PEFT know our tuners, and transformers their attention: the only file that touches their tables."""

from __future__ import annotations

import peft
from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner

from rankbits.tuners.bayesian_lora import BayesianLoraConfig, BayesianLoraModel
from rankbits.tuners.bayesian_lora.attention import register_attention
from rankbits.tuners.bottleneck import BottleneckConfig, BottleneckModel
from rankbits.tuners.dylora import DyloraConfig, DyloraModel
from rankbits.tuners.mora import MoraConfig, MoraModel
from rankbits.tuners.peft_type import RankbitsPeftType
from rankbits.tuners.sbora import SboraConfig, SboraModel

TUNERS: dict[RankbitsPeftType, tuple[type[PeftConfig], type[BaseTuner]]] = {
    RankbitsPeftType.BAYESIAN_LORA: (BayesianLoraConfig, BayesianLoraModel),
    RankbitsPeftType.BOTTLENECK: (BottleneckConfig, BottleneckModel),
    RankbitsPeftType.DYLORA: (DyloraConfig, DyloraModel),
    RankbitsPeftType.MORA: (MoraConfig, MoraModel),
    RankbitsPeftType.SBORA: (SboraConfig, SboraModel),
}
TABLES = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")
HOOKS = ("_get_adapter_state_dict", "_create_and_replace", "_replace_module", "inject_adapter")


def register() -> None:
    """Enter every tuner of this package into PEFT's look-up tables, and its attention into transformers'.

    Calling it again changes nothing.

    Raises:
        ImportError: this version of PEFT lacks what we plug into, or already has a method of the same name.
    """
    missing = [name for name in TABLES if not hasattr(mapping, name)]
    missing += [f"BaseTuner.{name}" for name in HOOKS if not hasattr(BaseTuner, name)]
    if missing:
        raise ImportError(
            f"rankbits cannot plug into peft {peft.__version__}: it has no {', '.join(missing)}. "
            "This version of rankbits works with peft>=0.21,<0.22"
        )
    for peft_type, (config, tuner) in TUNERS.items():
        known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)  # type: ignore[call-overload]
        if known is not None and known is not config:
            raise ImportError(
                f"peft {peft.__version__} already has a method {peft_type.value!r} ({known.__module__}), which "
                "rankbits would replace: upgrade rankbits, or use a peft without it"
            )
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config  # type: ignore[index]
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner  # type: ignore[index]
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner.prefix  # type: ignore[index]
    register_attention()
