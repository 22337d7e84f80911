"""Answers from memory: generated from the prompt alone, whatever the answer that stands beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_decoder import byte_tokenizer, save_tiny_decoder
from transformers import LlamaForCausalLM

from rankbits import tasks
from rankbits.recipes.encoding import encode
from rankbits.recipes.load import load
from rankbits.recipes.recall import recalled
from rankbits.recipes.run import evaluate, run

TASK = tasks.get("memorisation")
# Prompts of different lengths, so that the shorter one is padded.
ROWS = {"key": ["a", "bcd"], "value": ["0123", "4567"]}
TOKENIZER = byte_tokenizer(padding="<|pad|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder")
    save_tiny_decoder(path)
    return path


def counts(model: Any, rows: dict[str, list[str]], batch: int = 2) -> list[list[int]]:
    table = datasets.Dataset.from_dict(rows)
    found: list[list[int]] = recalled(model, TOKENIZER, TASK, table, encode(table, TASK, TOKENIZER, 64), batch).tolist()
    return found


def said(model: Any, prompt: str, length: int) -> str:
    """The most likely tokens one by one, by hand."""
    ids = TOKENIZER(prompt)["input_ids"]
    for _ in range(length):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return TOKENIZER.decode(ids[-length:], skip_special_tokens=True)


def test_what_a_model_says_is_compared_with_the_answer_and_not_what_it_says_of_the_answer(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    model.resize_token_embeddings(len(TOKENIZER))
    with torch.no_grad():
        answers = [said(model, f"{key}:", 4) for key in ROWS["key"]]
    assert all(len(answer.strip()) == 4 for answer in answers), "these weights would say spaces"
    wrong = [answer[:3] + chr(ord(answer[3]) ^ 1) for answer in answers]
    for batch in (1, 2):
        assert counts(model, {**ROWS, "value": answers}, batch) == [[4, 4], [4, 4]]
        assert counts(model, {**ROWS, "value": wrong}, batch) == [[3, 4], [3, 4]]


def test_the_model_goes_on_in_the_mode_it_was_in(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(TOKENIZER))
    for mode in (True, False):
        model.train(mode)
        counts(model, ROWS)
        assert model.training == mode


def _changes(folder: Path, output: Path, method: str, steps: int) -> list[str]:
    return [
        f"model={folder}",
        f"method={method}",
        "task.name=memorisation",
        "task.train_rows=4",
        "task.max_length=66",
        "training.epochs=null",
        f"training.max_steps={steps}",
        "training.batch_size=4",
        "training.learning_rate=2e-2",
        f"output={output}",
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_pairs_are_learned_by_heart_and_a_finished_run_still_knows_them(folder: Path, tmp_path: Path) -> None:
    changes = ["adapter.targets=all-linear", *_changes(folder, tmp_path / "run", "lora", 60)]
    record = run(load("methods/lora", changes), command="test")
    (score,) = record.scores
    assert (score.metric, score.split, score.primary) == ("character_accuracy", "train", True)
    assert score.value > 90
    assert (record.data.train_rows, record.data.evaluation_rows) == (4, {"train": 4})
    (again,) = evaluate(tmp_path / "run")
    assert again == score


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["prefix", "prompt", "bayesian-lora"])
def test_what_comes_before_a_prompt_and_what_sits_on_a_layer_generates_too(
    folder: Path, tmp_path: Path, method: str
) -> None:
    base = "methods/lora" if method == "bayesian-lora" else f"methods/{method}"
    record = run(load(base, _changes(folder, tmp_path / "run", method, 2)), command="test")
    assert record.primary_score().metric == "character_accuracy"
    assert evaluate(tmp_path / "run") == record.scores
