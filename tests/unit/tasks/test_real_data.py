"""The published files, where $RANKBITS_DATA holds them: how many rows are there and how many go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rankbits import tasks

# Rows left to train on, rows to evaluate, rows dropped.
COUNTS = {
    "cola": (8_527, 1_043, {"duplicate": 8, "in_evaluation": 16}),
    "sst2": (66_983, 872, {"duplicate": 366, "in_evaluation": 0}),
    "mrpc": (3_668, 408, {"duplicate": 0, "in_evaluation": 0, "swapped_in_evaluation": 0}),
    "stsb": (5_701, 1_500, {"duplicate": 39, "in_evaluation": 6, "swapped_in_evaluation": 3}),
    "rte": (2_488, 277, {"duplicate": 2, "in_evaluation": 0}),
    "gsm8k": (7_473, 1_319, {"duplicate": 0, "in_evaluation": 0}),
    "e2e_nlg": (2_254, 4_693, {"duplicate": 151, "in_evaluation": 0}),
}


@pytest.mark.real_data
@pytest.mark.parametrize("name", COUNTS)
def test_the_published_files_have_the_rows_we_say(name: str) -> None:
    root = os.environ.get("RANKBITS_DATA")
    if not root:
        pytest.skip(f"RANKBITS_DATA is not set; it should name a folder that holds {name}/")
    if not (Path(root) / name).is_dir():
        pytest.skip(f"there is no folder {Path(root) / name}")
    data = tasks.load(tasks.get(name), data=None, train_rows=None, evaluate_on="validation", seed=0)
    (evaluated,) = data.evaluation.values()
    assert (len(data.train), len(evaluated), data.dropped) == COUNTS[name]
