"""The eight GLUE tasks: columns, labels, splits and metrics as the benchmark publishes them."""

from __future__ import annotations

import pytest

from rankbits import tasks

PAIR = ("sentence1", "sentence2")

EXPECTED = {
    "cola": (("sentence",), 2, ("matthews",), "matthews"),
    "sst2": (("sentence",), 2, ("accuracy",), "accuracy"),
    "mrpc": (PAIR, 2, ("accuracy", "f1"), "accuracy"),
    "stsb": (PAIR, 1, ("pearson", "spearman"), "pearson"),
    "qqp": (("question1", "question2"), 2, ("accuracy", "f1"), "accuracy"),
    "mnli": (("premise", "hypothesis"), 3, ("accuracy",), "accuracy"),
    "qnli": (("question", "sentence"), 2, ("accuracy",), "accuracy"),
    "rte": (PAIR, 2, ("accuracy",), "accuracy"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_columns_outputs_and_metrics(name: str) -> None:
    task = tasks.get(name)
    assert (task.text_columns, task.num_labels, task.metrics, task.primary_metric) == EXPECTED[name]
    assert (task.hub_name, task.hub_config, task.label_column) == ("glue", name, "label")


def test_only_stsb_is_a_regression_from_0_to_5() -> None:
    regressions = [name for name in EXPECTED if tasks.get(name).kind == "regression"]
    assert regressions == ["stsb"]
    assert tasks.get("stsb").label_range == (0.0, 5.0)
    assert tasks.get("stsb").label_names == ()


def test_only_mnli_is_evaluated_on_two_splits() -> None:
    several = {name: tasks.get(name).validation_names for name in EXPECTED if len(tasks.get(name).validation_names) > 1}
    assert several == {"mnli": ("validation_matched", "validation_mismatched")}


def test_label_names_are_in_the_order_of_the_hub() -> None:
    assert tasks.get("cola").label_names == ("unacceptable", "acceptable")
    assert tasks.get("sst2").label_names == ("negative", "positive")
    assert tasks.get("mrpc").label_names == ("not_equivalent", "equivalent")
    assert tasks.get("qqp").label_names == ("not_duplicate", "duplicate")
    assert tasks.get("mnli").label_names == ("entailment", "neutral", "contradiction")
    assert tasks.get("qnli").label_names == tasks.get("rte").label_names == ("entailment", "not_entailment")


def test_only_tasks_about_sameness_are_symmetric() -> None:
    assert {name for name in EXPECTED if tasks.get(name).symmetric} == {"mrpc", "stsb", "qqp"}
