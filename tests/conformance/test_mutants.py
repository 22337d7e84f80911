"""PEFT's tests notice when the tuner breaks: each of its duties is taken away in turn, and some test must fail."""

from __future__ import annotations

import itertools
from typing import Any

import mutation
import pytest
from mutation import Line, Mutant, Value
from peft import PeftConfig

pytestmark = pytest.mark.slow

SHARED = "rankbits.tuners.linear:AdapterLinear"
ADAPTERS = "rankbits.tuners.bayesian_lora.adapters:GatedAdapters"
LAYER = "rankbits.tuners.bayesian_lora.layer:BayesianLoraLinear"
MODEL = "rankbits.tuners.bayesian_lora.model:BayesianLoraModel"
CONFIG = "rankbits.tuners.bayesian_lora.config:BayesianLoraConfig"


def rank_only(group: str, *names: str) -> tuple[str, ...]:
    """Node ids of some tests of rank-only Bayesian-LoRA, which can do all that upstream asks for."""
    return tuple(f"test_bayesian_lora.py::TestRankOnly{group}::{name}" for name in names)


def without_rank(config: PeftConfig) -> dict[str, Any]:
    """`to_dict` that forgets the rank."""
    return {name: value for name, value in PeftConfig.to_dict(config).items() if name != "r"}


MUTANTS = [
    Mutant(
        "unmerge adds instead of subtracts",
        (Line(f"{SHARED}.unmerge", "self._originals.pop()", "(2 * self.get_base_weight() - self._originals.pop())"),),
        rank_only("Custom", "test_merge_layers")
        + rank_only("Multi", "test_multiple_active_adapters_merge_and_unmerge"),
    ),
    Mutant(
        "disable_adapters is ignored in forward",
        (Line(f"{SHARED}.forward", "if self.disable_adapters:", "if False:"),),
        rank_only("Custom", "test_disable_adapters") + rank_only("Decoder", "test_disable_adapter"),
    ),
    Mutant(
        "the merged weight holds twice the update",
        (Line(f"{LAYER}.merged_weight", "+ update", "+ 2 * update"),),
        rank_only("Custom", "test_merge_layers") + rank_only("Quantization", "test_merge_unmerge_unload"),
    ),
    Mutant(
        "the merged adapter is not recorded",
        (Line(f"{SHARED}.merge", "self.merged_adapters.append(name)", "pass"),),
        rank_only("Custom", "test_merge_layers_is_idempotent") + rank_only("Decoder", "test_merge_layers"),
    ),
    Mutant(
        "merge ignores adapter_names",
        (
            Line(
                f"{SHARED}.merge", "check_adapters_to_merge(self, adapter_names)", "check_adapters_to_merge(self, None)"
            ),
        ),
        rank_only("Multi", "test_merge_layers_multi") + rank_only("Decoder", "test_merge_layers_multi"),
    ),
    Mutant(
        "the input is not cast to the adapter's dtype",
        (Line(f"{LAYER}._update", "self._cast_input_dtype(x, down.dtype)", "x"),),
        rank_only("Custom", "test_forward_float16", "test_forward_bfloat16")
        + rank_only("Decoder", "test_generate_half_prec"),
    ),
    Mutant(
        "the output is not cast back to the input's dtype",
        (
            Line(f"{SHARED}.forward", "self.adapted_forward(x).to(dtype)", "self.adapted_forward(x)"),
            Line(f"{LAYER}.adapted_forward", "self._pass_gates(name)).to(result.dtype)", "self._pass_gates(name))"),
        ),
        rank_only("Custom", "test_forward_float16", "test_forward_bfloat16")
        + rank_only("Decoder", "test_generate_half_prec"),
    ),
    Mutant(
        "other_param_names is empty",
        (Value(f"{ADAPTERS}.other_param_names", ()),),
        rank_only("Custom", "test_delete_adapter_properly_cleans_up_after_itself"),
    ),
    Mutant(
        "forward uses a second reference to a parameter",
        (
            Line(
                f"{ADAPTERS}.update_layer",
                "self._move_adapter_to_device_of_base_layer(adapter_name)",
                'self.__dict__["kept"] = self.bayesian_lora_down[adapter_name]; '
                "self._move_adapter_to_device_of_base_layer(adapter_name)",
            ),
            Line(f"{ADAPTERS}._factors", "self.bayesian_lora_down[adapter_name]", "self.kept"),
        ),
        rank_only("Custom", "test_forward_float16_no_autocast", "test_forward_bfloat16_no_autocast"),
    ),
    Mutant(
        "a random tensor of the adapter is not saved",
        (
            Line(
                f"{MODEL}._get_adapter_state_dict",
                "return entries",
                'return {key: value for key, value in entries.items() if "bayesian_lora_down" not in key}',
            ),
        ),
        rank_only("Custom", "test_save_load_roundtrip", "test_save_load_roundtrip_direct_injection"),
    ),
    Mutant(
        "a field of the config is left out of to_dict",
        (Value(f"{CONFIG}.to_dict", without_rank),),
        rank_only("Decoder", "test_save_pretrained", "test_inference_safetensors"),
    ),
    Mutant(
        "safe_merge does not check that the weight is finite",
        (Line(f"{SHARED}.merge", "if safe_merge and", "if False and"),),
        rank_only("Decoder", "test_merge_layers_nan"),
    ),
    Mutant(
        "merge writes weight.data instead of set_base_weight",
        (Line(f"{SHARED}.merge", "self.set_base_weight(", "setattr(self.get_base_layer().weight, 'data', "),),
        rank_only("Quantization", "test_merge_unmerge_unload"),
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
