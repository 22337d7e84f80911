"""Registration enters PEFT's tables once, and refuses a PEFT it does not fit."""

import pytest
from peft import LoraConfig, mapping
from peft.tuners.tuners_utils import BaseTuner

from rankbits.tuners.bayesian_lora import BayesianLoraConfig, BayesianLoraModel
from rankbits.tuners.peft_type import RankbitsPeftType
from rankbits.tuners.register import register

NAME = RankbitsPeftType.BAYESIAN_LORA


def _entries() -> list[object]:
    tables = (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    )
    return [table.get("BAYESIAN_LORA") for table in tables]


def test_registering_again_changes_nothing() -> None:
    sizes = len(mapping.PEFT_TYPE_TO_CONFIG_MAPPING), len(mapping.PEFT_TYPE_TO_TUNER_MAPPING)
    register()
    assert _entries() == [BayesianLoraConfig, BayesianLoraModel, "bayesian_lora_"]
    assert sizes == (len(mapping.PEFT_TYPE_TO_CONFIG_MAPPING), len(mapping.PEFT_TYPE_TO_TUNER_MAPPING))


def test_a_foreign_method_of_the_same_name_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, NAME, LoraConfig)
    with pytest.raises(ImportError, match=r"already has a method 'BAYESIAN_LORA' \(peft\.tuners\.lora\.config\)"):
        register()
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[NAME] is LoraConfig


@pytest.mark.parametrize(
    ("place", "name", "said"),
    [
        (mapping, "PEFT_TYPE_TO_PREFIX_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"),
        (BaseTuner, "_get_adapter_state_dict", r"BaseTuner\._get_adapter_state_dict"),
    ],
)
def test_a_peft_without_what_we_need_is_refused(monkeypatch: pytest.MonkeyPatch, place, name, said) -> None:
    monkeypatch.delattr(place, name)
    with pytest.raises(ImportError, match=rf"cannot plug into peft .*it has no {said}.*peft>=0\.21,<0\.22"):
        register()


def test_the_type_is_the_string_that_configurations_store() -> None:
    assert BayesianLoraConfig().peft_type == "BAYESIAN_LORA"
    assert hash(NAME) == hash("BAYESIAN_LORA")
