"""A model that no formula knows: counted as it runs without weights, or refused with what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXModel,
)

from rankbits.accounting.measure import cost
from rankbits.errors import ModelError, RecipeError, UnknownArchitectureError
from rankbits.recipes.live import count_live

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=64)
UNKNOWN = UnknownArchitectureError("no formula knows it")
CLASSES = {"language-model": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}


@pytest.fixture
def model(tmp_path: Path):
    """Saves a config with changes and gives its folder."""

    def model(**changes: object) -> str:
        CONFIG.save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")
        return str(tmp_path)

    return model


def _parameters(live: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in live.parameters())


def test_a_bare_model_is_counted_as_it_runs(model):
    live = GPTNeoXModel(CONFIG)
    parameters, counted = count_live(model(), ["sequence_length=8"], UNKNOWN)
    assert parameters == _parameters(live)
    expected = cost(live, sequence_length=8)
    assert counted.macs == expected.macs > 0
    assert counted.products == expected.products
    assert counted.options == expected.options


@pytest.mark.parametrize("head", CLASSES)
def test_a_head_that_is_asked_for_is_counted(model, head: str):
    config = CONFIG_MAPPING["gpt_neox"].from_dict(CONFIG.to_dict())
    config.num_labels = 5
    live = CLASSES[head].from_config(config)
    keys = ["sequence_length=8", f"head={head}", "num_labels=5"]
    parameters, counted = count_live(model(), keys, UNKNOWN)
    assert parameters == _parameters(live)
    assert counted.macs == cost(live, sequence_length=8).macs
    assert parameters > count_live(model(), ["sequence_length=8"], UNKNOWN)[0]


def test_a_cache_lengthens_what_attention_sees(model):
    products = count_live(model(), ["sequence_length=1", "cache_length=7"], UNKNOWN)[1].products
    scores = [product for product in products if product.op == "scores"]
    assert [(product.batch, product.m, product.k, product.n) for product in scores] == [(4, 1, 8, 8)] * 2


def test_a_model_that_transformers_does_not_know_is_refused_as_the_formulas_did(model):
    with pytest.raises(UnknownArchitectureError) as caught:
        count_live(model(model_type="of-my-own"), ["sequence_length=8"], UNKNOWN)
    assert caught.value is UNKNOWN


@pytest.mark.parametrize("size", [0, -8])
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_sizes_below_one_are_refused_by_name(model, name: str, size: int):
    with pytest.raises(ModelError, match=rf"config\.json: {name}: given {size}, expected at least 1"):
        count_live(model(**{name: size}), ["sequence_length=8"], UNKNOWN)


@pytest.mark.parametrize(
    "changes",
    [{"num_attention_heads": 0}, {"num_attention_heads": 5}, {"hidden_size": "many"}, {"hidden_act": "none such"}],
    ids=["no heads", "heads that do not divide", "text", "an unknown activation"],
)
def test_a_config_that_transformers_cannot_build_is_refused(model, changes: dict):
    with pytest.raises(UnknownArchitectureError, match="transformers cannot build a gpt_neox with head=none: "):
        count_live(model(**changes), ["sequence_length=8"], UNKNOWN)


def test_a_length_beyond_the_models_is_refused(model):
    with pytest.raises(ModelError, match="query_len: given 65, expected at most 64"):
        count_live(model(), ["sequence_length=65"], UNKNOWN)


def test_one_stack_has_no_source(model):
    with pytest.raises(ModelError, match="source_len: given 4, but GPTNeoXModel has one stack"):
        count_live(model(), ["sequence_length=8", "source_length=4"], UNKNOWN)


def test_keys_are_checked_here_too(model):
    with pytest.raises(RecipeError, match="sequence_length: given 0"):
        count_live(model(), ["sequence_length=0"], UNKNOWN)
