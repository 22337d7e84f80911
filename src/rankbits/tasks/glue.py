"""The eight GLUE tasks that papers on adapters report (Wang et al. 2019), in the hub's columns and label numbers."""

from __future__ import annotations

from functools import partial

from rankbits.tasks.task import Task

_glue = partial(Task, hub_name="glue")
_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS = (
    _glue(
        name="cola",
        description="CoLA: is an English sentence acceptable?",
        text_columns=("sentence",),
        kind="classification",
        label_names=("unacceptable", "acceptable"),
        metrics=("matthews",),
        primary_metric="matthews",
        hub_config="cola",
    ),
    _glue(
        name="sst2",
        description="SST-2: is a film review positive?",
        text_columns=("sentence",),
        kind="classification",
        label_names=("negative", "positive"),
        metrics=("accuracy",),
        primary_metric="accuracy",
        hub_config="sst2",
    ),
    _glue(
        name="mrpc",
        description="MRPC: do two sentences of the news say the same?",
        text_columns=_PAIR,
        kind="classification",
        label_names=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        primary_metric="accuracy",
        hub_config="mrpc",
        symmetric=True,
    ),
    _glue(
        name="stsb",
        description="STS-B: how similar are two sentences, from 0 to 5?",
        text_columns=_PAIR,
        kind="regression",
        label_names=(),
        label_range=(0.0, 5.0),
        metrics=("pearson", "spearman"),
        primary_metric="pearson",
        hub_config="stsb",
        symmetric=True,
    ),
    _glue(
        name="qqp",
        description="QQP: do two questions ask the same?",
        text_columns=("question1", "question2"),
        kind="classification",
        label_names=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        primary_metric="accuracy",
        hub_config="qqp",
        symmetric=True,
    ),
    _glue(
        name="mnli",
        description="MNLI: does the premise entail the hypothesis, contradict it, or neither?",
        text_columns=("premise", "hypothesis"),
        kind="classification",
        label_names=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        primary_metric="accuracy",
        validation_names=("validation_matched", "validation_mismatched"),
        hub_config="mnli",
    ),
    _glue(
        name="qnli",
        description="QNLI: does a sentence hold the answer to a question?",
        text_columns=("question", "sentence"),
        kind="classification",
        label_names=_ENTAILMENT,
        metrics=("accuracy",),
        primary_metric="accuracy",
        hub_config="qnli",
    ),
    _glue(
        name="rte",
        description="RTE: does the first text entail the second?",
        text_columns=_PAIR,
        kind="classification",
        label_names=_ENTAILMENT,
        metrics=("accuracy",),
        primary_metric="accuracy",
        hub_config="rte",
    ),
)
