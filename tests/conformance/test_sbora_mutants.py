"""PEFT's tests notice when SBoRA breaks: each of its own duties is taken away in turn, and some test must fail."""

from __future__ import annotations

import itertools
from typing import Any

import mutation
import pytest
from mutation import Line, Mutant, Value
from peft import PeftConfig

pytestmark = pytest.mark.slow

SHARED = "rankbits.tuners.linear:AdapterLinear"
LAYER = "rankbits.tuners.sbora.layer:SboraLinear"
MODEL = "rankbits.tuners.sbora.model:SboraModel"
CONFIG = "rankbits.tuners.sbora.config:SboraConfig"
WRITTEN = "rankbits.tuners.sbora.written"


def both(group: str, *names: str) -> tuple[str, ...]:
    """Node ids of some tests of either variant."""
    return tuple(f"test_sbora.py::Test{kind}{group}::{name}" for kind in ("Inputs", "Outputs") for name in names)


def without_rank(config: PeftConfig) -> dict[str, Any]:
    """`to_dict` that forgets the rank."""
    return {name: value for name, value in PeftConfig.to_dict(config).items() if name != "r"}


MUTANTS = [
    Mutant(
        "unmerge leaves what was merged",
        (Line(f"{WRITTEN}:WrittenInPlace._change", ".put(weight, self._before.pop(name))", ""),),
        both("Custom", "test_merge_layers") + both("Multi", "test_multiple_active_adapters_merge_and_unmerge"),
    ),
    Mutant(
        "disable_adapters is ignored in forward",
        (Line(f"{SHARED}.forward", "if self.disable_adapters:", "if False:"),),
        both("Custom", "test_disable_adapters") + both("Decoder", "test_disable_adapter"),
    ),
    Mutant(
        "the merged weight holds twice the update",
        (Line(f"{WRITTEN}:SliceUpdate.sum_with", "+ values", "+ 2 * values"),),
        both("Custom", "test_merge_layers") + both("Quantization", "test_merge_unmerge_unload"),
    ),
    Mutant(
        "the update is written elsewhere than it is read",
        (Line(f"{LAYER}.slice_update", "].clone(), values", "].roll(1), values"),),
        both("Custom", "test_merge_layers") + both("Decoder", "test_merge_layers"),
    ),
    Mutant(
        "the merged adapter is not recorded",
        (Line(f"{LAYER}.merge", "self.merged_adapters.extend(names)", "pass"),),
        both("Custom", "test_merge_layers_is_idempotent") + both("Decoder", "test_merge_layers"),
    ),
    Mutant(
        "merge ignores adapter_names",
        (
            Line(
                f"{LAYER}.merge", "check_adapters_to_merge(self, adapter_names)", "check_adapters_to_merge(self, None)"
            ),
        ),
        both("Multi", "test_merge_layers_multi") + both("Decoder", "test_merge_layers_multi"),
    ),
    Mutant(
        "the input is not cast to the adapter's dtype",
        (
            Line(f"{LAYER}._from_inputs", "self._cast_input_dtype(chosen, up.dtype)", "chosen"),
            Line(f"{LAYER}._to_outputs", "self._cast_input_dtype(x, down.dtype)", "x"),
        ),
        both("Custom", "test_forward_float16", "test_forward_bfloat16") + both("Decoder", "test_generate_half_prec"),
    ),
    Mutant(
        "the output is not cast back to the input's dtype",
        (
            Line(f"{SHARED}.forward", "self.adapted_forward(x).to(dtype)", "self.adapted_forward(x)"),
            Line(
                f"{LAYER}.adapted_forward", "self._from_inputs(name, x).to(result.dtype)", "self._from_inputs(name, x)"
            ),
        ),
        both("Custom", "test_forward_float16", "test_forward_bfloat16") + both("Decoder", "test_generate_half_prec"),
    ),
    Mutant(
        "other_param_names is empty",
        (Value(f"{LAYER}.other_param_names", ()),),
        both("Custom", "test_delete_adapter_properly_cleans_up_after_itself"),
    ),
    Mutant(
        "what is trained is not saved",
        (
            Line(
                f"{MODEL}._remap_adapter_state_dict_for_load",
                "return entries",
                'return {key: value for key, value in entries.items() if "sbora_indices" in key}',
            ),
        ),
        both("Custom", "test_save_load_roundtrip", "test_save_load_roundtrip_direct_injection"),
    ),
    Mutant(
        "a field of the config is left out of to_dict",
        (Value(f"{CONFIG}.to_dict", without_rank),),
        both("Decoder", "test_save_pretrained", "test_inference_safetensors"),
    ),
    Mutant(
        "safe_merge does not check that the weight is finite",
        (Line(f"{LAYER}.merge", "if safe_merge:", "if False:"),),
        both("Decoder", "test_merge_layers_nan"),
    ),
    Mutant(
        "a quantized base is written to as if it were not",
        (
            Line(
                f"{WRITTEN}:WrittenAndRequantized._change",
                "layer.set_base_weight(weight)",
                'setattr(layer.get_base_layer().weight, "data", weight)',
            ),
        ),
        both("Quantization", "test_merge_unmerge_unload"),
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
