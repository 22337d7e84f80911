"""A config is read key by key, and every wrong value is named with what was expected in its place."""

import re

import pytest

from rankbits.accounting.architectures.config import Config
from rankbits.errors import ModelError


def _config(**values):
    return Config(values, name="my-model")


def _complaint(read):
    with pytest.raises(ModelError) as caught:
        read()
    return str(caught.value)


@pytest.mark.parametrize("value", [0, -1, -768, 1.0, "768", True, [768]])
def test_a_size_is_a_whole_number_above_zero(value):
    complaint = _complaint(lambda: _config(hidden_size=value).size("hidden_size", 768))
    assert complaint == (f"config of my-model: hidden_size: given {value!r}, expected a whole number of at least 1")


def test_a_missing_size_without_a_default_is_named():
    expected = "config of my-model: hidden_size: given nothing, expected a whole number of at least 1"
    assert _complaint(lambda: _config().size("hidden_size")) == expected
    assert "given None" in _complaint(lambda: _config(hidden_size=None).size("hidden_size"))


def test_null_and_absent_mean_the_default():
    assert _config(key=None).size("key", 12) == _config().size("key", 12) == 12
    assert _config(key=3).size("key", 12) == 3


def test_the_least_size_can_be_lowered_for_what_a_model_may_lack():
    assert _config(type_vocab_size=0).size("type_vocab_size", minimum=0) == 0
    assert _config(buckets=-1).size("buckets", minimum=-1) == -1
    assert "at least -1" in _complaint(lambda: _config(buckets=-2).size("buckets", minimum=-1))


def test_an_optional_size_is_none_only_where_it_is_absent():
    assert _config().optional_size("sliding_window") is None
    assert _config(sliding_window=None).optional_size("sliding_window") is None
    assert _config(sliding_window=4096).optional_size("sliding_window") == 4096
    assert "given 0" in _complaint(lambda: _config(sliding_window=0).optional_size("sliding_window"))


def test_heads_divide_the_hidden_size():
    assert _config(heads=12, hidden=768).part_of("heads", "hidden") == 64
    expected = "config of my-model: heads: given 10, expected a divisor of hidden, which is 768"
    assert _complaint(lambda: _config(heads=10, hidden=768).part_of("heads", "hidden")) == expected


@pytest.mark.parametrize("value", [0, 1, "true"])
def test_a_flag_is_true_or_false(value):
    assert _complaint(lambda: _config(tied=value).flag("tied", True)).endswith("expected true or false")
    assert _config().flag("tied", True) is True
    assert _config(tied=False).flag("tied", True) is False


def test_a_name_is_text():
    assert _config(model_type="bert").model_type == "bert"
    for value in (3, "", None):
        assert _complaint(lambda value=value: _config(model_type=value).model_type).endswith("expected a name")
    assert _config().text("norm", "none") == "none"


def test_names_come_as_a_list_or_parted_by_bars():
    assert _config(kinds="p2c|c2p").texts("kinds") == ("p2c", "c2p")
    assert _config(kinds=["c2p"]).texts("kinds") == ("c2p",)
    assert _config(kinds="").texts("kinds") == _config().texts("kinds") == ()
    for value in (3, [3], {"c2p": 1}):
        assert _complaint(lambda value=value: _config(kinds=value).texts("kinds")).endswith("expected a list of names")


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        ({}, 32),
        ({"torch_dtype": "float32"}, 32),
        ({"torch_dtype": "bfloat16"}, 16),
        ({"dtype": "float16"}, 16),
        ({"dtype": "torch.float16", "torch_dtype": "float32"}, 16),
        ({"dtype": None, "torch_dtype": "float8_e4m3fn"}, 8),
    ],
)
def test_weights_are_as_wide_as_their_type(values, bits):
    assert _config(**values).stored_bits == bits


def test_an_unknown_type_of_number_is_refused_under_the_key_that_holds_it():
    with pytest.raises(ModelError, match=re.escape("torch_dtype: given 'posit', expected one of float32, float,")):
        _config(torch_dtype="posit").stored_bits  # noqa: B018
    with pytest.raises(ModelError, match=r"my-model: dtype: given 16, expected a name"):
        _config(dtype=16).stored_bits  # noqa: B018


def test_presence_is_a_value_other_than_null():
    assert _config(key=0).has("key")
    assert not _config(key=None).has("key")
    assert not _config().has("key")
