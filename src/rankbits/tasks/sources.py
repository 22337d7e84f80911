"""Where rows come from: files in a folder, or a data set on the Hugging Face hub or laid out like one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rankbits.errors import TaskError
from rankbits.tasks.files import ENDINGS, read_columns
from rankbits.tasks.task import Task

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True)
class Table:
    """One split as it was read: columns by name, and what messages call the place it came from."""

    columns: Mapping[str, list[object]]
    origin: str


@dataclass(frozen=True)
class Source:
    """Where a task's splits can be read.

    Args:
        description: for records; never an absolute path.
        read: from the name of a split to its table; raises TaskError if there is none.
        duplicates: how many duplicate rows were already removed.
    """

    description: str
    read: Callable[[str], Table]
    duplicates: int = 0


def named_source(task: Task, data: str) -> Source:
    """The source that a recipe names: a folder if there is one of that name, else a set on the hub.

    Raises:
        TaskError: there is no such folder and this cannot be the name of a set, or what is there cannot be read.
    """
    folder = Path(data).expanduser()
    if folder.is_dir():
        return folder_source(task, folder)
    if folder.exists():
        raise TaskError(f"task {task.name}: data {data!r} is a file; expected a folder that holds train and validation")
    if not _HUB_NAME.fullmatch(data):
        raise TaskError(f"task {task.name}: there is no folder {data!r}; expected a folder or the name of a hub set")
    return hub_source(task, data)


def folder_source(task: Task, folder: Path) -> Source:
    """A folder with one file a split (train.jsonl, validation.csv.gz, ...), or laid out like a set on the hub.

    Raises:
        TaskError: the folder cannot be read as a set of the hub and has no file for a split either.
    """
    if not folder.is_dir():
        raise TaskError(f"task {task.name}: there is no folder {str(folder)!r}")
    pattern = f"*{task.train_name}*"
    if not _split_files(folder, task.train_name) and any(path.suffix == ".parquet" for path in folder.rglob(pattern)):
        return Source(f"folder {folder.resolve().name}", hub_source(task, str(folder)).read)

    def read(split: str) -> Table:
        files = _split_files(folder, split)
        if len(files) != 1:
            found = ", ".join(path.name for path in files or sorted(folder.iterdir())) or "nothing"
            raise TaskError(
                f"task {task.name}: folder {str(folder)!r} must hold one file {split} with one of the endings "
                f"{', '.join(ENDINGS)}; found: {found}"
            )
        return Table(read_columns(files[0]), origin=str(files[0]))

    return Source(f"folder {folder.resolve().name}", read)


def hub_source(task: Task, name: str) -> Source:
    """A data set read with `datasets.load_dataset`, in the task's configuration where the set has one of that name.

    Args:
        task: its `hub_config` names the configuration.
        name: name on the hub, or the path of a folder laid out like a set there.

    Raises:
        TaskError: the set cannot be reached or read.
    """
    import datasets

    config: str | None = None
    try:
        if name == task.hub_name or task.hub_config in datasets.get_dataset_config_names(name):
            config = task.hub_config
        splits = datasets.load_dataset(name, config)
    # load_dataset documents no closed set of errors: network, missing files, unknown layout and bad rows all differ.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise TaskError(_not_loaded(task, name, error)) from error

    def read(split: str) -> Table:
        if split not in splits:
            raise TaskError(f"task {task.name}: {name!r} has no split {split!r}; its splits: {', '.join(splits)}")
        table = splits[split]
        return Table({column: list(table[column]) for column in table.column_names}, origin=f"{split} of {name}")

    return Source("/".join(["hub: " + name, *([config] if config else [])]), read)


def _split_files(folder: Path, split: str) -> list[Path]:
    return [path for ending in ENDINGS if (path := folder / f"{split}{ending}").is_file()]


def _not_loaded(task: Task, name: str, error: Exception) -> str:
    """What was tried, what went wrong, and how to do without the hub."""
    asked = ", ".join(repr(part) for part in (name, task.hub_config if name == task.hub_name else None) if part)
    nor = "" if name == task.hub_name or Path(name).is_dir() else " (and there is no folder of that name)"
    files = ", ".join(f"{split}.jsonl" for split in (task.train_name, *task.validation_names))
    columns = ", ".join((*task.text_columns, *([task.label_column] if task.label_column else [])))
    everywhere = f", or set RANKBITS_DATA to a folder that holds it as {task.name}/" if task.hub_name else ""
    return (
        f"task {task.name}: datasets.load_dataset({asked}) failed{nor}: {type(error).__name__}: {error}; to use local "
        f"files, put {files} with the columns {columns} into a folder and give it as the task's data "
        f"(task.data=FOLDER){everywhere}"
    )
