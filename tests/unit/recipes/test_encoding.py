"""Prompts and answers as token ids: what is learned, what is cut, what is padded."""

from __future__ import annotations

from dataclasses import replace

import datasets
import pytest
import torch
from tiny_decoder import byte_tokenizer

from rankbits import tasks
from rankbits.errors import ModelError, RecipeError
from rankbits.recipes.encoding import collator, encode
from rankbits.tasks.likelihood import IGNORED

GSM8K = replace(tasks.get("gsm8k"), prompt="Q {question} A", answer=" {answer}")
ROWS = datasets.Dataset.from_dict({"question": ["1+1?", "What is 2+2?"], "answer": ["2", "It is 4."]})
TOKENIZER = byte_tokenizer()
LONGEST_PROMPT = len("Q What is 2+2? A")


def test_the_answer_and_its_end_are_learned_and_the_prompt_is_not() -> None:
    encoded = encode(ROWS, GSM8K, TOKENIZER, 64)
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"]
    for row, prompt, answer in zip(encoded, ("Q 1+1? A", "Q What is 2+2? A"), (" 2", " It is 4."), strict=True):
        assert TOKENIZER.decode(row["input_ids"]) == f"{prompt}{answer}<|end|>"
        assert row["labels"][: len(prompt)] == [IGNORED] * len(prompt)
        assert TOKENIZER.decode(row["labels"][len(prompt) :]) == f"{answer}<|end|>"
        assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_long_rows_lose_the_end_of_their_answer() -> None:
    encoded = encode(ROWS, GSM8K, TOKENIZER, LONGEST_PROMPT + 3)
    assert TOKENIZER.decode(encoded[1]["input_ids"]) == "Q What is 2+2? A It"
    assert encoded[1]["labels"][LONGEST_PROMPT:] == encoded[1]["input_ids"][LONGEST_PROMPT:]


def test_prompts_that_leave_nothing_of_an_answer_are_refused_with_the_length_they_need() -> None:
    assert encode(ROWS, GSM8K, TOKENIZER, LONGEST_PROMPT + 1)
    with pytest.raises(
        RecipeError, match=rf"given {LONGEST_PROMPT}, but 1 of 2 prompts .* at least {LONGEST_PROMPT + 1}$"
    ):
        encode(ROWS, GSM8K, TOKENIZER, LONGEST_PROMPT)


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers.processors import TemplateProcessing

    ending = byte_tokenizer()
    end = (ending.eos_token, ending.eos_token_id)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    assert encode(ROWS, GSM8K, ending, 64)["input_ids"][:] == encode(ROWS, GSM8K, TOKENIZER, 64)["input_ids"][:]


def test_padding_is_masked_and_has_no_label_and_the_end_of_an_answer_keeps_its_own() -> None:
    encoded = encode(ROWS, GSM8K, TOKENIZER, 64)
    batch = collator(GSM8K, byte_tokenizer())(list(encoded))
    length = len(encoded[0]["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    # The token that pads is the one that ends a text: only its place tells them apart.
    assert batch["labels"][0, length - 1] == batch["input_ids"][0, length] == TOKENIZER.eos_token_id
    assert torch.all(batch["labels"][0, length:] == IGNORED)
    assert batch["attention_mask"][0].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)


def test_a_padding_token_of_its_own_is_kept() -> None:
    tokenizer = byte_tokenizer(padding="<|pad|>")
    collator(GSM8K, tokenizer)
    assert tokenizer.pad_token == "<|pad|>"


def test_a_tokenizer_with_nothing_to_pad_with_is_refused() -> None:
    with pytest.raises(ModelError, match="neither a padding token nor one that ends a text"):
        collator(GSM8K, byte_tokenizer(end=None))


def test_labelled_rows_keep_their_label_and_are_read_as_before() -> None:
    rows = datasets.Dataset.from_dict({"sentence": ["good", "bad"], "label": [1, 0]})
    encoded = encode(rows, tasks.get("sst2"), TOKENIZER, 3)
    assert encoded["labels"][:] == [1, 0]
    assert [TOKENIZER.decode(ids) for ids in encoded["input_ids"]] == ["goo", "bad"]
