"""Sources: folders with files, folders laid out like the hub, and what happens when neither can be read."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from rankbits import tasks
from rankbits.errors import TaskError
from rankbits.tasks.sources import folder_source, hub_source, named_source

COLA, MNLI, FILMS = tasks.get("cola"), tasks.get("mnli"), tasks.get("film-reviews")

README = """---
configs:
- config_name: cola
  data_files:
  - split: train
    path: cola/train-*
  - split: validation
    path: cola/validation-*
  - split: test
    path: cola/test-*
- config_name: sst2
  data_files:
  - split: train
    path: sst2/train-*
---
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches out of the user's home, and keep it from asking the network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def hub_layout(tmp_path: Path) -> Path:
    """A folder like the GLUE set on the hub: a README that names configurations, a Parquet file a split."""
    root = tmp_path / "glue"
    for config, split, labels in [
        ("cola", "train", [0, 1]),
        ("cola", "validation", [1]),
        ("cola", "test", [-1]),
        ("sst2", "train", [0]),
    ]:
        (root / config).mkdir(parents=True, exist_ok=True)
        texts = [f"{config} {split} {index}" for index in range(len(labels))]
        table = pyarrow.table({"sentence": texts, "label": labels, "idx": list(range(len(labels)))})
        parquet.write_table(table, root / config / f"{split}-00000-of-00001.parquet")
    (root / "README.md").write_text(README)
    return root


def test_the_configuration_of_the_task_is_read_from_a_set_that_has_several(hub_layout: Path) -> None:
    table = hub_source(COLA, str(hub_layout)).read("train")
    assert table.columns == {"sentence": ["cola train 0", "cola train 1"], "label": [0, 1], "idx": [0, 1]}


def test_the_set_of_the_task_is_asked_for_as_the_hub_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, ...]] = []

    def load_dataset(*names: str) -> dict[str, datasets.Dataset]:
        asked.append(names)
        return {"train": datasets.Dataset.from_dict({"sentence": ["a"], "label": [1]})}

    # The hub itself cannot run here.
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = hub_source(COLA, "glue")
    assert asked == [("glue", "cola")]
    assert source.description == "hub: glue/cola"
    assert source.read("train").columns == {"sentence": ["a"], "label": [1]}


@pytest.mark.parametrize("inside", ["", "cola"])
def test_a_folder_laid_out_like_the_hub_is_read_as_such(hub_layout: Path, inside: str) -> None:
    source = named_source(COLA, str(hub_layout / inside))
    assert source.read("validation").columns["sentence"] == ["cola validation 0"]
    assert source.description == f"folder {inside or 'glue'}"


def test_a_split_that_the_set_lacks_is_named_beside_those_it_has(hub_layout: Path) -> None:
    with pytest.raises(TaskError, match="no split 'validation_matched'; its splits: train, validation, test"):
        named_source(COLA, str(hub_layout)).read("validation_matched")


def test_a_hub_out_of_reach_says_what_was_tried_and_how_to_use_local_files() -> None:
    with pytest.raises(TaskError) as caught:
        hub_source(MNLI, "glue")
    for part in (
        "task mnli: datasets.load_dataset('glue', 'mnli') failed",
        "train.jsonl, validation_matched.jsonl, validation_mismatched.jsonl",
        "premise, hypothesis, label",
        "task.data=FOLDER",
        "RANKBITS_DATA",
    ):
        assert part in str(caught.value)


def test_another_set_out_of_reach_says_that_it_is_no_folder_either() -> None:
    with pytest.raises(TaskError) as caught:
        named_source(FILMS, "some-org/films")
    assert "datasets.load_dataset('some-org/films') failed (and there is no folder of that name)" in str(caught.value)
    assert "RANKBITS_DATA" not in str(caught.value)


@pytest.mark.parametrize("data", ["no/such/folder", "./missing", "/missing/folder", "../missing"])
def test_what_can_only_be_a_folder_and_is_missing_is_refused(data: str) -> None:
    with pytest.raises(TaskError, match="there is no folder"):
        named_source(COLA, data)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(TaskError, match="is a file; expected a folder"):
        named_source(COLA, str(tmp_path / "train.jsonl"))


def test_a_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="there is no folder"):
        folder_source(COLA, tmp_path / "cola")


def test_a_folder_of_files_is_read_split_by_split(tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "train.csv").write_text("sentence,label\na,1\n")
    source = named_source(COLA, str(tmp_path / "reviews"))
    assert source.read("train").columns == {"sentence": ["a"], "label": ["1"]}
    assert source.description == "folder reviews"


def test_a_folder_may_be_named_from_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "train.jsonl").write_text('{"sentence": "a"}')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named_source(COLA, "~/reviews").read("train").columns == {"sentence": ["a"]}


def test_a_missing_file_is_named_beside_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(TaskError, match=r"one file validation .*\.jsonl, .*found: notes\.txt, train\.jsonl"):
        folder_source(COLA, tmp_path).read("validation")


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(TaskError, match=r"one file train .*found: train\.jsonl, train\.csv"):
        folder_source(COLA, tmp_path).read("train")
