"""Tasks of a language model: it reads a prompt and is scored on the tokens of the answer, and on no others."""

from __future__ import annotations

from functools import partial

from rankbits.tasks.task import Task

_completion = partial(
    Task,
    kind="completion",
    label_names=(),
    label_column=None,
    metrics=("loss", "perplexity"),
    primary_metric="loss",
    validation_names=("test",),
)

TASKS = (
    _completion(
        name="gsm8k",
        description="GSM8K (Cobbe et al. 2021): grade-school word problems with worked solutions",
        text_columns=("question", "answer"),
        prompt="Question: {question}\nAnswer:",
        answer=" {answer}",
        group_column="question",
        hub_name="openai/gsm8k",
        hub_config="main",
    ),
    _completion(
        name="e2e_nlg",
        description=(
            "E2E NLG (Novikova et al. 2017): a restaurant in words, from its attributes; half of the published "
            "validation split is learned from and the other half is for development"
        ),
        text_columns=("meaning_representation", "human_reference"),
        prompt="Attributes: {meaning_representation}\nDescription:",
        answer=" {human_reference}",
        # One restaurant has several descriptions: all of them stay on one side, as in the published splits.
        group_column="meaning_representation",
        hub_name="tuetschek/e2e_nlg",
        train_name="validation",
        set_aside=0.5,
    ),
)
