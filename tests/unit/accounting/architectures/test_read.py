"""A config is found on this machine or not at all, and only known architectures are read from it."""

import json
import re

import pytest

from rankbits.accounting.architectures.config import Head
from rankbits.accounting.architectures.read import (
    READERS,
    SHAPES,
    find_config,
    read_shape,
    shape_names,
)
from rankbits.accounting.params import base_parameters
from rankbits.errors import ModelError, UnknownArchitectureError

NAMES = [
    "bart-base",
    "bert-base",
    "bert-large",
    "deberta-v2-xxlarge",
    "deberta-v3-base",
    "deberta-v3-large",
    "gpt3-175b",
    "llama-13b",
    "llama-7b",
    "llama2-70b",
    "llama2-7b",
    "llama3-8b",
    "minilm-l6",
    "mt0-large",
    "phi-2",
    "qwen2-7b",
    "roberta-base",
    "roberta-large",
    "smollm2-135m",
    "t5-base",
]
NO_SIZES = {
    "_source",
    "activation_function",
    "conv_act",
    "hidden_act",
    "max_window_layers",
    "n_positions",
    "partial_rotary_factor",
    "relative_attention_max_distance",
    "sliding_window",
}
"""Keys that change no count: which function is applied, how far positions reach, a window that is switched off."""
WHOLE_MODELS = {
    "bart-base": (Head.LANGUAGE_MODEL, 139_420_416),
    "bert-base": (Head.NONE, 109_482_240),
    "bert-large": (Head.NONE, 335_141_888),
    "deberta-v2-xxlarge": (Head.NONE, 1_564_549_632),
    "deberta-v3-base": (Head.CLASSIFICATION, 184_423_682),
    "deberta-v3-large": (Head.NONE, 434_012_160),
    "gpt3-175b": (Head.LANGUAGE_MODEL, 174_604_283_904),
    "llama-13b": (Head.LANGUAGE_MODEL, 13_015_864_320),
    "llama-7b": (Head.LANGUAGE_MODEL, 6_738_415_616),
    "llama2-70b": (Head.LANGUAGE_MODEL, 68_976_648_192),
    "llama2-7b": (Head.LANGUAGE_MODEL, 6_738_415_616),
    "llama3-8b": (Head.LANGUAGE_MODEL, 8_030_261_248),
    "minilm-l6": (Head.NONE, 22_713_216),
    "mt0-large": (Head.LANGUAGE_MODEL, 1_229_581_312),
    "phi-2": (Head.LANGUAGE_MODEL, 2_779_683_840),
    "qwen2-7b": (Head.LANGUAGE_MODEL, 7_615_616_512),
    "roberta-base": (Head.NONE, 124_645_632),
    "roberta-large": (Head.NONE, 355_359_744),
    "smollm2-135m": (Head.LANGUAGE_MODEL, 134_515_008),
    "t5-base": (Head.LANGUAGE_MODEL, 222_903_552),
}
"""Parameters of the published models, as their cards and papers give them in millions or billions."""
TINY = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 11,
}


class Watched(dict):
    """A config that remembers which keys it was asked for."""

    def __init__(self, values):
        super().__init__(values)
        self.seen = set()

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def _write(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(content, encoding="utf-8")
    return folder


def test_the_shapes_that_come_with_the_package():
    assert shape_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_shape_says_where_it_is_from_and_can_be_read(name):
    config = find_config(name)
    assert config["_source"]
    assert config["torch_dtype"] in {"float32", "float16", "bfloat16"}
    shape = read_shape(config, name=name)
    assert shape.name == name
    assert shape.model_type == config["model_type"]
    names = [part.name for part in shape.parts]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", NAMES)
def test_every_shape_has_the_parameters_of_the_published_model(name):
    head, parameters = WHOLE_MODELS[name]
    assert base_parameters(read_shape(find_config(name), name=name, head=head)) == parameters


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_shape_is_one_that_its_reader_looks_at(name):
    """A size that nobody looks at would be one that nobody checks."""
    config = Watched(find_config(name))
    heads = [Head.NONE, Head.LANGUAGE_MODEL if read_shape(config, name=name).decoder else Head.CLASSIFICATION]
    for head in heads:
        read_shape(config, name=name, head=head)
    assert set(config) - config.seen <= NO_SIZES


def test_an_unknown_architecture_is_named_with_the_known_ones():
    with pytest.raises(UnknownArchitectureError) as caught:
        read_shape({"model_type": "mamba"}, name="mine")
    assert str(caught.value) == (
        f"config of mine: model_type: given 'mamba', expected one of {', '.join(sorted(READERS))}"
    )
    assert isinstance(caught.value, ModelError)
    assert {"bert", "deberta-v2", "llama", "t5"} <= set(READERS)


def test_a_config_without_a_model_type_is_refused():
    with pytest.raises(ModelError, match="config of mine: model_type: given nothing, expected a name"):
        read_shape({}, name="mine")


@pytest.mark.parametrize("labels", [0, -1])
def test_a_head_has_at_least_one_label(labels):
    with pytest.raises(ModelError, match=f"num_labels: given {labels} for mine, expected at least 1"):
        read_shape(TINY, name="mine", head=Head.CLASSIFICATION, num_labels=labels)


def test_a_folder_or_a_file_holds_its_config(tmp_path):
    folder = _write(tmp_path / "mine", json.dumps(TINY))
    assert find_config(str(folder)) == TINY
    assert find_config(str(folder / "config.json")) == TINY


def test_a_name_of_ours_is_not_shadowed_by_a_folder(tmp_path, monkeypatch):
    _write(tmp_path / "bert-base", json.dumps(TINY))
    monkeypatch.chdir(tmp_path)
    assert find_config("bert-base")["hidden_size"] == 768
    assert find_config("./bert-base") == TINY


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "config.json is not JSON: Expecting property name"),
        ("[1, 2]", "config.json is not the config of a transformers model: expected an object with a model_type"),
        ('{"hidden_size": 8}', "expected an object with a model_type"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, content, complaint):
    folder = _write(tmp_path / "mine", content)
    with pytest.raises(ModelError, match=re.escape(complaint)) as caught:
        find_config(str(folder))
    assert repr(str(folder)) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match=re.escape("config.json is not JSON")):
        find_config(str(tmp_path))


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=re.escape("cannot read config.json: No such file or directory")):
        find_config(str(tmp_path))


def _cached(hub, revision="abc", config=TINY):
    repository = hub / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc\n", encoding="utf-8")
    _write(repository / "snapshots" / revision, json.dumps(config))


def test_a_hub_id_is_found_in_the_local_cache(tmp_path):
    _cached(tmp_path / "hub")
    assert find_config("org/model") == TINY


def test_the_cache_is_where_the_hubs_client_has_it(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE")
    for home in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(home, raising=False)
    below = {
        "HUGGINGFACE_HUB_CACHE": tmp_path / "old",
        "HF_HOME": tmp_path / "home" / "hub",
        "XDG_CACHE_HOME": tmp_path / "xdg" / "huggingface" / "hub",
        "HOME": tmp_path / "user" / ".cache" / "huggingface" / "hub",
    }
    values = {"HUGGINGFACE_HUB_CACHE": "old", "HF_HOME": "home", "XDG_CACHE_HOME": "xdg", "HOME": "user"}
    for variable, value in values.items():
        _cached(below[variable], config={**TINY, "_source": variable})
        with monkeypatch.context() as one:
            one.setenv(variable, str(tmp_path / value))
            assert find_config("org/model")["_source"] == variable


def test_the_cache_of_another_revision_is_not_taken(tmp_path):
    _cached(tmp_path / "hub", revision="old")
    with pytest.raises(ModelError, match="no config of 'org/model' on this machine"):
        find_config("org/model")


def test_the_hub_id_of_a_shape_of_ours_needs_no_cache():
    assert find_config("microsoft/deberta-v3-base") == find_config("deberta-v3-base")


def test_what_is_nowhere_is_refused_with_what_is_close():
    with pytest.raises(ModelError) as caught:
        find_config("deberta-v3-bas")
    message = str(caught.value)
    assert message.startswith("model: no config of 'deberta-v3-bas' on this machine: expected perhaps deberta-v3-base")
    assert "hf download ID config.json" in message
    with pytest.raises(ModelError, match="machine: expected one of bart-base"):
        find_config("zzz")


@pytest.mark.parametrize("model", ["", "~no-such-user/model", "x" * 5000, "nul\0byte"])
def test_what_is_no_path_at_all_is_refused_like_any_other(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"^model: "):
        find_config(model)


def test_shapes_are_files_of_the_package():
    assert SHAPES.joinpath("bert-base.json").is_file()
