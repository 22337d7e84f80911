"""The configuration reports all that is wrong with it together, and survives being written and read."""

import pickle

import pytest
from peft import PeftConfig

from rankbits import BottleneckConfig


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ValueError, match="BottleneckConfig") as failure:
        BottleneckConfig(
            kind="series",
            bottleneck_size=0,
            non_linearity="softmax",
            scaling=0.0,
            dropout=1.0,
            init_weights="gauss",
            layers_pattern="layers",
            train_layernorm=True,
            feed_forward={"output": "fc2", "norm": "ln"},
        )
    expected = [
        "`kind` must be one of ['houlsby', 'pfeiffer', 'parallel'], got 'series'",
        "`bottleneck_size` must be a positive integer or None, got 0",
        "`non_linearity` must be one of ['relu', 'swish', 'gelu', 'tanh'] or None, got 'softmax'",
        "`scaling` must be > 0 or None, got 0.0",
        "`dropout` must be in [0, 1), got 1.0",
        "`init_weights` must be True, 'zero', 'normal' or False, got 'gauss'",
        "`layers_pattern` needs `layers_to_transform`",
        "`train_layernorm` belongs to kind='houlsby', got kind='series'",
        "`feed_forward` needs the keys 'output' and 'input', and may have",
    ]
    message = str(failure.value)
    assert [text for text in expected if text not in message] == []
    assert message.count("; ") == len(expected) - 1


@pytest.mark.parametrize(
    ("kind", "norms", "message"),
    [
        ("houlsby", [], "`feed_forward` belongs to kind='pfeiffer' and kind='parallel'"),
        ("pfeiffer", [], "needs either 'norm_before' or 'norm_after', got"),
        ("pfeiffer", ["norm_before", "norm_after"], "needs either 'norm_before' or 'norm_after', got"),
    ],
)
def test_a_feed_forward_has_the_parts_that_its_kind_needs(kind, norms, message) -> None:
    parts = {"output": "fc2", "input": "fc1"} | dict.fromkeys(norms, "ln")
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(kind=kind, feed_forward=parts)


def test_a_configuration_survives_a_file_and_a_pickle(tmp_path) -> None:
    config = BottleneckConfig(
        kind="pfeiffer",
        bottleneck_size=3,
        scaling=2.0,
        use_biases=False,
        target_modules=["b", "a"],
        exclude_modules=["c"],
        feed_forward={"output": "a", "input": "b", "norm_after": "n"},
        init_weights="normal",
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, BottleneckConfig)
    assert loaded.to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.peft_type == "BOTTLENECK"
