"""Models with the head that a task needs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_decoder import save_tiny_decoder
from transformers import (
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaModel,
)

from rankbits import tasks
from rankbits.errors import ModelError
from rankbits.recipes import models

GSM8K, MRPC, STSB = tasks.get("gsm8k"), tasks.get("mrpc"), tasks.get("stsb")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_decoder(tmp_path_factory.mktemp("decoder"))


def test_a_completion_gets_the_head_of_the_pre_training(decoder: str) -> None:
    loaded = models.load_model(decoder, GSM8K)
    assert isinstance(loaded, LlamaForCausalLM)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not loaded.config.use_cache


def test_a_label_gets_a_fresh_classifier_on_the_same_decoder(decoder: str) -> None:
    loaded = models.load_model(decoder, MRPC)
    assert isinstance(loaded, LlamaForSequenceClassification)
    assert loaded.score.out_features == 2


def test_a_head_starts_around_a_value(tmp_path: Path) -> None:
    for family, config in ((BertModel, BertConfig), (RobertaModel, RobertaConfig)):
        family(config(vocab_size=20, **SIZES)).save_pretrained(tmp_path)
        loaded = models.load_model(str(tmp_path), STSB).eval()
        ids = torch.arange(3, 9).reshape(2, 3)
        before = loaded(input_ids=ids).logits
        models.start_head_at(loaded, 2.75)
        torch.testing.assert_close(loaded(input_ids=ids).logits, before + 2.75)


def test_a_head_without_a_bias_cannot_start_there(decoder: str) -> None:
    loaded = models.load_model(decoder, STSB)
    with pytest.raises(ModelError, match=r"task\.start_at_mean: .*LlamaForSequenceClassification has no bias"):
        models.start_head_at(loaded, 2.75)


def test_an_encoder_cannot_complete(tmp_path: Path) -> None:
    BertModel(BertConfig(vocab_size=20, **SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no trained head of a language model: 'cls\."):
        models.load_model(str(tmp_path), GSM8K)


def test_a_decoder_without_some_of_its_weights_is_refused(decoder: str, tmp_path: Path) -> None:
    config = json.loads((Path(decoder) / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((Path(decoder) / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"are of another model: .* such as 'model\.layers\.2\."):
        models.load_model(str(tmp_path), GSM8K)
