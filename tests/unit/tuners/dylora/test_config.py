"""The configuration reports all that is wrong with it together, and survives being written and read."""

import pickle

import pytest
from peft import PeftConfig

from rankbits import DyloraConfig


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ValueError, match="DyloraConfig") as failure:
        DyloraConfig(
            r=0,
            alpha=0.0,
            dropout=1.0,
            init_weights="gauss",
            train_mode="all",
            evaluation_rank=2,
            layers_pattern="layers",
        )
    expected = [
        "`r` must be a positive integer, got 0",
        "`alpha` must be > 0, got 0.0",
        "`dropout` must be in [0, 1), got 1.0",
        "`init_weights` must be True or False, got 'gauss'",
        "`train_mode` must be one of ['frozen', 'prefix'], got 'all'",
        "`evaluation_rank` must be in [1, r=0] or None, got 2",
        "`layers_pattern` needs `layers_to_transform`",
    ]
    message = str(failure.value)
    assert [text for text in expected if text not in message] == []
    assert message.count("; ") == len(expected) - 1


@pytest.mark.parametrize("rank", [0, 5, 2.5, True])
def test_an_evaluation_rank_has_to_be_one_of_the_ranks(rank) -> None:
    with pytest.raises(ValueError, match=rf"`evaluation_rank` must be in \[1, r=4\] or None, got {rank}"):
        DyloraConfig(r=4, evaluation_rank=rank)
    assert [DyloraConfig(r=4, evaluation_rank=fits).evaluation_rank for fits in (None, 1, 4)] == [None, 1, 4]


def test_a_configuration_survives_a_file_and_a_pickle(tmp_path) -> None:
    config = DyloraConfig(
        r=3, alpha=5.0, target_modules=["b", "a"], exclude_modules=["c"], train_mode="prefix", evaluation_rank=2
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DyloraConfig)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.target_modules == {"a", "b"}
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.peft_type == "DYLORA"
