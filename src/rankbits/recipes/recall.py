"""What a language model says from memory: answers generated greedily from their prompts, compared by characters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rankbits.tasks.likelihood import IGNORED
from rankbits.tasks.memorisation import right_characters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rankbits.tasks import Task


def recalled(model: Any, tokenizer: Any, task: Task, rows: Any, encoded: Any, batch_size: int) -> NDArray[np.float64]:
    """How many characters of each answer are generated right, and how many it has.

    Each answer is generated from its prompt alone, the most likely token at a time, so that a mistake is read by what
    comes after it. Predicting every token from the true ones before it would score higher, but these give half of a
    value away. What the encoding cut off an answer is not generated, and counts as wrong.

    Args:
        model: a decoder, with or without adapters; its mode is left as it was.
        tokenizer: the model's.
        task: whose answers the rows hold.
        rows: a data set with the task's text columns.
        encoded: the same rows, as `encoding.encode` makes them.
        batch_size: rows that are generated together.

    Returns:
        [n, 2].
    """
    # Some tokenizers put a space before a text when they read it or when they write it.
    texts = [task.answer.format(**row).strip() for row in rows]
    labels = encoded["labels"][:]
    prompts = [ids[: row.count(IGNORED)] for ids, row in zip(encoded["input_ids"][:], labels, strict=True)]
    longest = max(len(row) - row.count(IGNORED) for row in labels)
    given = []
    for start in range(0, len(prompts), batch_size):
        given += _continued(model, tokenizer, prompts[start : start + batch_size], longest)
    counts = [[right_characters(one, other), len(other)] for one, other in zip(given, texts, strict=True)]
    return np.array(counts, dtype=np.float64)


@torch.no_grad()
def _continued(model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int) -> list[str]:
    """What the model adds to each prompt, at most so many tokens, in words."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    training = model.training
    model.eval()
    greedy = {"do_sample": False, "num_beams": 1, "use_cache": True, "pad_token_id": tokenizer.pad_token_id}
    found = model.generate(**batch, max_new_tokens=tokens, **greedy)
    model.train(training)
    new = found[:, batch["input_ids"].shape[1] :]  # [b, at most tokens]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
