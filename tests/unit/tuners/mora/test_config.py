"""The configuration knows types by name and by number, reports all that is wrong together, and survives a file."""

import pickle

import pytest
from peft import PeftConfig

import rankbits
from rankbits.accounting import mora
from rankbits.tuners.mora import MoraConfig, MoraType
from rankbits.tuners.mora.config import ROTATION_BELOW


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ValueError, match="MoraConfig") as failure:
        MoraConfig(r=0, mora_type="shared", rounding="up", dropout=1.0, init_weights="zero", layers_pattern="layers")
    expected = [
        "`r` must be a positive integer, got 0",
        "`mora_type` must be one of ['truncation', 'sharing', 'sharing_adjacent', 'sharing_adjacent_inputs', "
        "'sharing_adjacent_outputs', 'decoupling', 'rotation'], [1, 2, 3, 4, 6] or None, got 'shared'",
        "`rounding` must be one of ['nearest', 'floor'], got 'up'",
        "`dropout` must be in [0, 1), got 1.0",
        "`init_weights` must be True or False, got 'zero'",
        "`layers_pattern` needs `layers_to_transform`",
    ]
    message = str(failure.value)
    assert [text for text in expected if text not in message] == []
    assert message.count("; ") >= len(expected) - 1


@pytest.mark.parametrize("number", [0, 5, 7, -1, True])
def test_numbers_without_a_type_are_refused(number) -> None:
    with pytest.raises(ValueError, match=rf"`mora_type` must be one of .*, got {number}"):
        MoraConfig(mora_type=number)


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (1, "sharing"),
        (2, "sharing_adjacent"),
        (3, "sharing_adjacent_inputs"),
        (4, "sharing_adjacent_outputs"),
        (6, "rotation"),
    ],
)
def test_a_number_becomes_a_name(number, name) -> None:
    config = MoraConfig(mora_type=number)
    assert config.mora_type == name
    assert config.kind is MoraType(name)
    assert config == MoraConfig(mora_type=name)


def test_small_ranks_rotate_and_large_ones_share() -> None:
    assert ROTATION_BELOW == mora.ROTATION_BELOW
    assert MoraConfig(r=63).kind is MoraType.ROTATION
    assert MoraConfig(r=64).kind is MoraType.SHARING
    assert MoraConfig(r=64, mora_type="rotation").kind is MoraType.ROTATION


def test_only_types_with_blocks_can_fold() -> None:
    assert MoraConfig(fold=True).fold
    assert MoraConfig(fold=True, mora_type="decoupling", r=200).fold
    with pytest.raises(ValueError, match=r"`fold` is only for the types \['decoupling', 'rotation'\], not for 'shar"):
        MoraConfig(fold=True, r=64)


def test_a_configuration_survives_a_file_and_a_pickle(tmp_path) -> None:
    config = MoraConfig(r=3, mora_type=6, rounding="floor", fold=True, target_modules=["b", "a"], exclude_modules=["c"])
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoraConfig)
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.target_modules, loaded.exclude_modules) == ({"a", "b"}, {"c"})
    assert pickle.loads(pickle.dumps(config)) == config


def test_it_is_public() -> None:
    assert rankbits.MoraConfig is MoraConfig
    assert "MoraConfig" in rankbits.__all__
