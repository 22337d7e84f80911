"""From a task's rows to the token ids and labels of a batch."""

from __future__ import annotations

from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from rankbits.errors import ModelError, RecipeError
from rankbits.tasks import Task
from rankbits.tasks.likelihood import IGNORED


def encode(rows: Any, task: Task, tokenizer: Any, max_length: int) -> Any:
    """Rows as token ids and labels; padding is left to the collator, batch by batch.

    Args:
        rows: a data set with the task's text columns.
        task: what is read: texts with a label, or a prompt with the answer to learn.
        tokenizer: the model's.
        max_length: tokens a row is cut to, at its end.

    Raises:
        RecipeError: a prompt is so long that nothing of its answer is left.
    """
    completes = task.kind == "completion"

    def labelled(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [batch[column] for column in task.text_columns]
        encoded: dict[str, list[Any]] = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        return {**encoded, "labels": batch["label"]}

    def completed(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return _completions(batch, task, tokenizer, max_length)

    encoded = rows.map(
        completed if completes else labelled,
        batched=True,
        remove_columns=rows.column_names,
        load_from_cache_file=False,
    )
    if completes:
        _refuse_prompts_alone(encoded, task, max_length)
    return encoded.remove_columns("prompt_tokens") if completes else encoded


def _completions(batch: dict[str, list[Any]], task: Task, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
    """Prompt and answer one after the other, the labels of the prompt's tokens IGNORED, the answer ended by its end."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    prompts = tokenizer([task.prompt.format(**row) for row in rows])["input_ids"]
    answers = tokenizer([task.answer.format(**row) for row in rows], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    found: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": [], "prompt_tokens": []}
    for prompt, answer in zip(prompts, answers, strict=True):
        # Some tokenizers end every text; here the answer has yet to come.
        before = prompt[:-1] if prompt and prompt[-1] == end else prompt
        after = [*answer, end] if end is not None else answer
        ids = [*before, *after][:max_length]
        found["input_ids"].append(ids)
        found["attention_mask"].append([1] * len(ids))
        found["labels"].append([*[IGNORED] * len(before), *after][:max_length])
        found["prompt_tokens"].append(len(before))
    return found


def _refuse_prompts_alone(encoded: Any, task: Task, max_length: int) -> None:
    lengths = encoded["prompt_tokens"][:]
    alone = sum(length >= max_length for length in lengths)
    if alone:
        raise RecipeError(
            f"task.max_length: given {max_length}, but {alone} of {len(lengths)} prompts of {task.name} are that long, "
            f"so that nothing of their answers is left; expected at least {max(lengths) + 1}"
        )


def collator(task: Task, tokenizer: Any) -> Any:
    """What pads the rows of a batch to the longest of them, and labels with IGNORED.

    Raises:
        ModelError: the tokenizer has no token to pad with.
    """
    if task.kind != "completion":
        return DataCollatorWithPadding(tokenizer)
    # Padding is masked and has no labels, so that any token does.
    padding = tokenizer.pad_token or tokenizer.eos_token
    if padding is None:
        raise ModelError("model: its tokenizer has neither a padding token nor one that ends a text; expected one")
    tokenizer.pad_token = padding
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
