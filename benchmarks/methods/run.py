"""Does every method of the family learn, on an encoder and on a decoder? Runs them, prints the table."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from points import DECODER, POINTS, SCORED_ROWS, UNTRAINED, Point
from results import RESULTS, path_of, verdict
from transformers import Trainer, set_seed

from rankbits import tasks
from rankbits.recipes import encoding, facts, models
from rankbits.recipes.load import load
from rankbits.recipes.run import run
from rankbits.recipes.schema import Recipe
from rankbits.recipes.scoring import reduction, score
from rankbits.recipes.trainer import arguments
from rankbits.records import write_atomically
from rankbits.tasks.files import read_columns
from rankbits.tasks.loading import DATA_VARIABLE
from rankbits.tasks.rows import rows_of
from rankbits.tasks.sources import Table
from rankbits.tasks.splits import subset

COMMAND = "benchmarks/methods/run.py"


def decoder_data(scratch: Path) -> Path:
    """The decoder's task with its test split cut to the rows that are scored."""
    task, folder = tasks.get(DECODER), scratch / "data" / DECODER
    folder.mkdir(parents=True, exist_ok=True)
    published = Path(os.environ[DATA_VARIABLE]) / DECODER
    for split in (task.train_name, *task.validation_names):
        (found,) = published.glob(f"{split}.json*")
        if split == task.train_name:
            shutil.copyfile(found, folder / found.name)
            continue
        rows = subset(rows_of(Table(read_columns(found), str(found)), task), SCORED_ROWS)
        lines = [json.dumps(dict(zip(task.text_columns, row.texts, strict=True))) for row in rows]
        write_atomically(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
    return folder


def recipe_of(point: Point, scratch: Path) -> Recipe:
    """The recipe of a point, with its data, what it starts from, and its run folder."""
    data = [f"task.data={decoder_data(scratch)}"] if point.task == DECODER else []
    start = [f"model={scratch / point.start.name / 'model'}"] if point.start else []
    return load(point.recipe, [*point.changes, *data, *start, f"output={scratch / point.name}"])


def command_of(point: Point) -> str:
    """What a reader types to get the same."""
    return shlex.join([COMMAND, "--only", point.name])


def untrained(point: Point, recipe: Recipe) -> dict[str, Any]:
    """The scores of the model as it is loaded, with the fresh head of the seed where the task has labels."""
    task = tasks.get(recipe.task.name)
    data = tasks.load(task, data=recipe.task.data, train_rows=None, evaluate_on="validation", seed=point.seed)
    set_seed(point.seed)
    tokenizer = models.load_tokenizer(recipe.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=models.load_model(recipe.model, task),
            args=arguments(recipe, folder, "none"),
            data_collator=encoding.collator(task, tokenizer),
            processing_class=tokenizer,
            preprocess_logits_for_metrics=reduction(task),
        )
        scores = score(trainer, task, data, recipe)
    return {
        "name": point.name,
        "command": command_of(point),
        "seed": point.seed,
        "scores": [entry.model_dump(mode="json") for entry in scores],
        "versions": facts.versions(),
        "machine": facts.machine(),
    }


def work(point: Point, scratch: Path) -> None:
    """Store the result of a point. Whatever rankbits raises comes through; nothing is stored then."""
    RESULTS.mkdir(exist_ok=True)
    if point.start is not None and not (scratch / point.start.name / "record.json").is_file():
        run(recipe_of(point.start, scratch), command=command_of(point.start))
    recipe = recipe_of(point, scratch)
    if point.method == UNTRAINED:
        write_atomically(path_of(point), json.dumps(untrained(point, recipe), indent=2, allow_nan=False) + "\n")
        return
    record = run(recipe, command=command_of(point), announce=lambda what: print(f"  {what}", flush=True))
    record.write(path_of(point))


def main() -> int:
    """Run what is missing, or list it; print the table, and fail if a method did not leave its floor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="only points whose name matches, as file names do"
    )
    parser.add_argument("--list", action="store_true", help="print the names of all points, finished ones marked")
    parser.add_argument("--table", action="store_true", help="print what is finished and do nothing else")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, default=Path("runs/methods"), help="folder of runs and checkpoints")
    given = parser.parse_args()
    if given.list:
        print("\n".join(f"{'x' if path_of(point).is_file() else ' '} {point.name}" for point in POINTS))
        return 0
    if not given.table:
        points = [point for point in POINTS if fnmatch(point.name, f"*{given.only}*")]
        if not points:
            parser.error(f"no point matches {given.only!r}; --list shows their names")
        if not os.environ.get(DATA_VARIABLE):
            parser.error(f"{DATA_VARIABLE} is not set; it should name a folder that holds stsb/ and e2e_nlg/")
        torch.set_num_threads(given.threads)
        warnings.simplefilter("ignore")
        for point in points:
            if not path_of(point).is_file():
                print(point.name, flush=True)
                work(point, given.scratch)
    text, failed = verdict()
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
