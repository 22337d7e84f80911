"""What a configuration accepts, and how one becomes a configuration per task."""

import pytest

from rankbits.tuners.sbora.config import SboraConfig, Variant, task_configs


def test_all_invalid_fields_are_reported_together() -> None:
    with pytest.raises(ValueError, match="SboraConfig: ") as failure:
        SboraConfig(
            r=0, alpha=0.0, variant="fc", dropout=1.0, init_weights="lora", seed=0.5, first=-1, layers_pattern="h"
        )
    for part in [
        "`r` must be a positive integer, got 0",
        "`alpha` must be > 0, got 0.0",
        "`variant` must be one of ['fa', 'fb'], got 'fc'",
        "`dropout` must be in [0, 1), got 1.0",
        "`init_weights` must be True or False, got 'lora'",
        "`seed` must be an integer, got 0.5",
        "`first` must be an integer >= 0, got -1",
        "`layers_pattern` needs `layers_to_transform`",
    ]:
        assert part in str(failure.value)


@pytest.mark.parametrize("wrong", [{"r": 2.0}, {"r": True}, {"first": True}, {"seed": "1"}])
def test_what_is_no_integer_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="integer"):
        SboraConfig(**wrong)


def test_the_type_is_the_string_that_configurations_store() -> None:
    config = SboraConfig(target_modules=["q"], exclude_modules=["k"])
    assert config.peft_type == "SBORA"
    assert config.target_modules == {"q"}
    assert config.exclude_modules == {"k"}
    assert [variant.value for variant in Variant] == ["fa", "fb"]


def test_saved_and_loaded_every_field_is_the_same(tmp_path) -> None:
    config = SboraConfig(r=3, alpha=5.0, variant="fb", dropout=0.1, seed=7, disjoint=True, first=2, target_modules="q")
    config.save_pretrained(tmp_path)
    assert SboraConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_configurations_of_tasks_follow_one_another_and_keep_the_scale() -> None:
    common = SboraConfig(r=8, alpha=16.0, seed=5, first=1, target_modules=["q"])
    configs = task_configs(common, {"a": 4, "b": 2, "c": 1})
    assert [(c.r, c.first, c.alpha, c.disjoint, c.seed) for c in configs.values()] == [
        (4, 1, 8.0, True, 5),
        (2, 5, 4.0, True, 5),
        (1, 7, 2.0, True, 5),
    ]
    assert all(c.target_modules == {"q"} for c in configs.values())
    assert (common.r, common.first, common.disjoint) == (8, 1, False)
    with pytest.raises(ValueError, match="`r` must be a positive integer, got 0"):
        task_configs(common, {"a": 0})
