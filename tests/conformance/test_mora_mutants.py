"""PEFT's tests notice when MoRA breaks: what it shares with all tuners, and each duty of its own layer."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import mutation
import pytest
import test_mutants
from mutation import Line, Mutant, Value
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner

pytestmark = pytest.mark.slow

LAYER = "rankbits.tuners.mora.layer:MoraLinear"
MODEL = "rankbits.tuners.mora.model:MoraModel"
CONFIG = "rankbits.tuners.mora.config:MoraConfig"
ROTATION = "test_mora.py::TestMoraRotation"
SHARING = "test_mora.py::TestMoraSharing"


def rotation(group: str, *names: str) -> tuple[str, ...]:
    """Node ids of some tests of MoRA by rotation."""
    return tuple(f"{ROTATION}{group}::{name}" for name in names)


def of_mora(mutant: Mutant) -> Mutant:
    """A mutant of the shared layer, looked for by MoRA's tests."""
    tests = (test.replace("test_bayesian_lora.py::TestRankOnly", ROTATION) for test in mutant.tests)
    return dataclasses.replace(mutant, tests=tuple(tests))


def without(field: str) -> Any:
    """`to_dict` that forgets a field."""
    return lambda config: {name: value for name, value in PeftConfig.to_dict(config).items() if name != field}


def nothing_saved(cls: type[BaseTuner], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A checkpoint without the square matrices."""
    entries = BaseTuner._get_adapter_state_dict.__func__(cls, *args, **kwargs)  # type: ignore[attr-defined]
    return {key: value for key, value in entries.items() if "mora_M" not in key}


SHARED = [
    of_mora(mutant)
    for mutant in test_mutants.MUTANTS
    if all(isinstance(edit, Line) and edit.place.startswith(test_mutants.SHARED) for edit in mutant.edits)
]
OWN = [
    Mutant(
        "the merged weight holds twice the update",
        (Line(f"{LAYER}.merged_weight", "weight + update", "weight + 2 * update"),),
        rotation("Custom", "test_merge_layers") + rotation("Quantization", "test_merge_unmerge_unload"),
    ),
    Mutant(
        "the input is not cast to the matrix's dtype",
        (Line(f"{LAYER}.adapted_forward", "self._cast_input_dtype(x, matrix.dtype)", "x"),),
        rotation("Custom", "test_forward_float16", "test_forward_bfloat16")
        + rotation("Decoder", "test_generate_half_prec"),
    ),
    Mutant(
        "the output is not cast back to the input's dtype",
        (
            Line(f"{test_mutants.SHARED}.forward", "self.adapted_forward(x).to(dtype)", "self.adapted_forward(x)"),
            Line(f"{LAYER}.adapted_forward", "self.forms[name]).to(result.dtype)", "self.forms[name])"),
        ),
        rotation("Custom", "test_forward_float16", "test_forward_bfloat16")
        + rotation("Decoder", "test_generate_half_prec"),
    ),
    Mutant(
        "other_param_names is empty",
        (Value(f"{LAYER}.other_param_names", ()),),
        rotation("Custom", "test_delete_adapter_properly_cleans_up_after_itself"),
    ),
    Mutant(
        "the matrix is not saved",
        (Value(f"{MODEL}._get_adapter_state_dict", classmethod(nothing_saved)),),
        rotation("Custom", "test_save_load_roundtrip", "test_save_load_roundtrip_direct_injection"),
    ),
    Mutant(
        "the rank is left out of to_dict",
        (Value(f"{CONFIG}.to_dict", without("r")),),
        rotation("Decoder", "test_save_pretrained", "test_inference_safetensors"),
    ),
    Mutant(
        "the type is left out of to_dict",
        (Value(f"{CONFIG}.to_dict", without("mora_type")),),
        (f"{SHARING}Custom::test_save_load_roundtrip", f"{SHARING}Decoder::test_save_pretrained"),
    ),
]
MUTANTS = SHARED + OWN


def test_the_shared_layer_has_its_mutants() -> None:
    assert len(SHARED) >= 6


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
