"""PEFT's tests notice when DyLoRA or a bottleneck adapter breaks in a way that its own code alone can break."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mutation
import pytest
from mutation import Line, Mutant, Value
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner

pytestmark = pytest.mark.slow

SHARED = "rankbits.tuners.linear:AdapterLinear"
DYLORA = "rankbits.tuners.dylora.layer:DyloraLinear"
DYLORA_MODEL = "rankbits.tuners.dylora.model:DyloraModel"
DYLORA_CONFIG = "rankbits.tuners.dylora.config:DyloraConfig"
BOTTLENECK = "rankbits.tuners.bottleneck.layer:BottleneckLinear"
BOTTLENECK_MODEL = "rankbits.tuners.bottleneck.model:BottleneckModel"
BOTTLENECK_CONFIG = "rankbits.tuners.bottleneck.config:BottleneckConfig"


def dylora(group: str, *names: str) -> tuple[str, ...]:
    """Node ids of some tests of DyLoRA at a rank below its largest."""
    return tuple(f"test_dylora.py::TestChosenRank{group}::{name}" for name in names)


def houlsby(group: str, *names: str) -> tuple[str, ...]:
    """Node ids of some tests of Houlsby's adapters."""
    return tuple(f"test_bottleneck_adapters.py::TestHoulsby{group}::{name}" for name in names)


def without(field: str) -> Callable[[PeftConfig], dict[str, Any]]:
    """`to_dict` that forgets a field."""
    return lambda config: {name: value for name, value in PeftConfig.to_dict(config).items() if name != field}


def losing(container: str) -> classmethod[Any, Any, Any]:
    """What collects the tensors to save, without those of a container."""

    def collect(cls: type[BaseTuner], *args: Any, **kwargs: Any) -> dict[str, Any]:
        entries = BaseTuner._get_adapter_state_dict.__func__(cls, *args, **kwargs)
        return {key: value for key, value in entries.items() if container not in key}

    return classmethod(collect)


HALF = ("test_forward_float16", "test_forward_bfloat16")
ROUND_TRIPS = ("test_save_load_roundtrip", "test_save_load_roundtrip_direct_injection")
CLEAN_UP = "test_delete_adapter_properly_cleans_up_after_itself"
UNCAST = Line(f"{SHARED}.forward", "self.adapted_forward(x).to(dtype)", "self.adapted_forward(x)")

MUTANTS = [
    Mutant(
        "DyLoRA merges at its largest rank",
        (
            Line(
                f"{DYLORA}.merged_weight",
                "self.lora_factors(adapter_name)",
                "self.lora_factors(adapter_name, self.r[adapter_name])",
            ),
        ),
        dylora("Custom", "test_merge_layers") + dylora("Quantization", "test_merge_unmerge_unload"),
    ),
    Mutant(
        "DyLoRA merges with the scale of its largest rank",
        (Line(f"{DYLORA}.merged_weight", "scaling * (", "self.alpha[adapter_name] / self.r[adapter_name] * ("),),
        dylora("Custom", "test_merge_layers") + dylora("Decoder", "test_merge_layers"),
    ),
    Mutant(
        "DyLoRA does not cast its input",
        (Line(f"{DYLORA}._update", "self._cast_input_dtype(x, down.dtype)", "x"),),
        dylora("Custom", *HALF) + dylora("Decoder", "test_generate_half_prec"),
    ),
    Mutant(
        "DyLoRA does not cast its output",
        (UNCAST, Line(f"{DYLORA}.adapted_forward", ".to(result.dtype)", "")),
        dylora("Custom", *HALF) + dylora("Decoder", "test_generate_half_prec"),
    ),
    Mutant(
        "DyLoRA runs inactive adapters",
        (Line(f"{DYLORA}.adapted_forward", "self.active_adapters", "self.dylora_down"),),
        dylora("Custom", "test_active_adapter") + dylora("Multi", "test_multiple_active_adapters_forward"),
    ),
    Mutant("DyLoRA lists no other parameters", (Value(f"{DYLORA}.other_param_names", ()),), dylora("Custom", CLEAN_UP)),
    Mutant(
        "DyLoRA does not save A",
        (Value(f"{DYLORA_MODEL}._get_adapter_state_dict", losing("dylora_down")),),
        dylora("Custom", *ROUND_TRIPS),
    ),
    Mutant(
        "DyLoRA does not save its largest rank",
        (Value(f"{DYLORA_CONFIG}.to_dict", without("r")),),
        dylora("Decoder", "test_save_pretrained", "test_inference_safetensors"),
    ),
    Mutant(
        "a bottleneck adapter does not cast its input",
        (Line(f"{BOTTLENECK}._addition", "self._cast_input_dtype(z, down.weight.dtype)", "z"),),
        houlsby("Custom", *HALF) + houlsby("Decoder", "test_generate_half_prec"),
    ),
    Mutant(
        "a bottleneck adapter does not cast its output",
        (UNCAST, Line(f"{BOTTLENECK}.adapted_forward", ".to(result.dtype)", "")),
        houlsby("Custom", *HALF) + houlsby("Decoder", "test_generate_half_prec"),
    ),
    Mutant(
        "inactive bottleneck adapters run",
        (Line(f"{BOTTLENECK}.adapted_forward", "self.active_adapters", "self.bottleneck_down"),),
        houlsby("Custom", "test_active_adapter") + houlsby("Multi", "test_multiple_active_adapters_forward"),
    ),
    Mutant(
        "a bottleneck adapter lists no other parameters",
        (Value(f"{BOTTLENECK}.other_param_names", ()),),
        houlsby("Custom", CLEAN_UP),
    ),
    Mutant(
        "a bottleneck adapter does not save its down projection",
        (Value(f"{BOTTLENECK_MODEL}._get_adapter_state_dict", losing("bottleneck_down")),),
        houlsby("Custom", *ROUND_TRIPS),
    ),
    Mutant(
        "a bottleneck adapter does not save its width",
        (Value(f"{BOTTLENECK_CONFIG}.to_dict", without("bottleneck_size")),),
        houlsby("Decoder", "test_save_pretrained", "test_inference_safetensors"),
    ),
]


def test_the_chosen_tests_pass_without_a_mutant() -> None:
    """Without this the mutants would prove nothing: a run that cannot start fails as well."""
    chosen = dict.fromkeys(itertools.chain.from_iterable(mutant.tests for mutant in MUTANTS))
    outcomes = mutation.run(tuple(chosen), stop=False)
    assert outcomes.failed == []
    assert len(outcomes.passed) >= 2 * len(chosen)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_caught(mutant: Mutant) -> None:
    with mutation.applied(mutant):
        outcomes = mutation.run(mutant.tests, stop=True)
    assert outcomes.failed, f"{mutant.name}: {len(outcomes.passed)} tests passed and none failed"
