"""Is a decoder trained under a budget of bits as good as LoRA, and better than LoRA rounded afterwards?"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from points import EVALUATION_ROWS, POINTS, STEPS, TASKS, Grid, Rounded, Trained, lora
from rounding import round_model, stored_bytes
from torch import nn
from torch.utils.data import DataLoader

from rankbits import tasks
from rankbits.recipes import encoding, facts, models
from rankbits.recipes.load import load
from rankbits.recipes.run import run
from rankbits.records import RunRecord
from rankbits.tasks.files import read_columns
from rankbits.tasks.likelihood import answer_nats
from rankbits.tasks.loading import DATA_VARIABLE
from rankbits.tasks.rows import rows_of
from rankbits.tasks.sources import Table
from rankbits.tasks.splits import subset

HERE = Path(__file__).parent
RESULTS = HERE / "results"
COMMAND = "benchmarks/decoder/run.py"


def data_folder(name: str, scratch: Path) -> Path:
    """A task's published files with the test split cut to the rows that are scored."""
    task, folder = tasks.get(name), scratch / "data" / name
    published = Path(os.environ[DATA_VARIABLE]) / name
    folder.mkdir(parents=True, exist_ok=True)
    for split in (task.train_name, *task.validation_names):
        (found,) = published.glob(f"{split}.json*")
        if split == task.train_name:
            shutil.copyfile(found, folder / found.name)
            continue
        rows = subset(rows_of(Table(read_columns(found), str(found)), task), EVALUATION_ROWS[name])
        lines = [json.dumps(dict(zip(task.text_columns, row.texts, strict=True))) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def train(point: Trained, scratch: Path) -> RunRecord:
    """The record of a run, which resumes in the scratch folder if it was interrupted."""
    recipe = load(
        f"{point.task}-smollm2",
        [
            *point.overrides,
            f"name={point.name}",
            f"training.max_steps={STEPS}",
            f"task.data={data_folder(point.task, scratch)}",
            f"output={scratch / point.name}",
        ],
    )
    return run(recipe, command=f"{COMMAND} --only {point.name}", announce=lambda what: print(f"  {what}", flush=True))


def round_and_score(point: Rounded, scratch: Path) -> dict[str, Any]:
    """The scores of the merged LoRA model with rounded weights; it is trained again where its folder is gone."""
    task, source = tasks.get(point.task), scratch / lora(point.task).name
    if not (source / "record.json").is_file():
        train(lora(point.task), scratch)
    recorded = json.loads((source / "record.json").read_text(encoding="utf-8"))
    folder = str(data_folder(point.task, scratch))
    data = tasks.load(task, data=folder, train_rows=None, evaluate_on="validation", seed=0)
    if data.fingerprint != recorded["data"]["fingerprint"]:
        sys.exit(f"{source} was trained on other rows than {folder} holds; remove it and its results")
    base = models.load_model("smollm2", task)
    model: Any = PeftModel.from_pretrained(base, str(source / "adapter")).merge_and_unload()
    # The head is the word list, which neither method rounds.
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"
    }
    weights = sum(layer.weight.numel() for layer in layers.values())
    widths = {} if point.bits is None else round_model(layers, point.bits, point.grid)
    mean = sum(width * layers[name].weight.numel() for name, width in widths.items()) / weights if widths else 32.0
    return {
        "name": point.name,
        "command": shlex.join([COMMAND, "--only", point.name]),
        "lora_recipe_hash": recorded["recipe_hash"],
        "data_fingerprint": data.fingerprint,
        "scores": score(model, task, data),
        "mean_bits": mean,
        "bits": widths,
        "weight_bytes": stored_bytes(weights, mean, point.grid) if widths else 4 * weights,
        "versions": facts.versions(),
        "machine": facts.machine(),
    }


def score(model: nn.Module, task: tasks.Task, data: tasks.TaskData) -> dict[str, float]:
    """What a run's own scoring would say of a model that no run made."""
    tokenizer = models.load_tokenizer("smollm2")
    (rows,) = data.evaluation.values()
    encoded = encoding.encode(rows, task, tokenizer, load(f"{task.name}-smollm2").task.max_length)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    ordered = encoded.select(sorted(range(len(lengths)), key=lengths.__getitem__))
    found = []
    model.eval()
    with torch.no_grad():
        for batch in DataLoader(ordered, batch_size=8, collate_fn=encoding.collator(task, tokenizer)):
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            found.append(answer_nats(output.logits, batch["labels"]))
    sums = torch.cat(found).numpy()  # [rows, 2]
    return task.score(sums, sums[:, 1])


def work(point: Trained | Rounded, scratch: Path) -> None:
    """Store the result of a point that has none; a stored one is never written again."""
    path = RESULTS / f"{point.name}.json"
    if path.is_file():
        return
    if isinstance(point, Rounded) and not (RESULTS / f"{lora(point.task).name}.json").is_file():
        print(f"{point.name}: left out, it rounds {lora(point.task).name}, which is not finished", flush=True)
        return
    print(point.name, flush=True)
    RESULTS.mkdir(exist_ok=True)
    if isinstance(point, Trained):
        train(point, scratch).write(path)
        return
    text = json.dumps(round_and_score(point, scratch), indent=2) + "\n"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.rename(path)


def table() -> list[str]:
    """Loss of every finished point beside LoRA's."""
    lines = ["| task | point | mean bits | weights, MB | nats per token | against LoRA |", "|---|---|---|---|---|---|"]
    for task in TASKS:
        path = RESULTS / f"{lora(task).name}.json"
        if not path.is_file():
            continue
        reference = _loss(json.loads(path.read_text(encoding="utf-8")))
        for point in (point for point in POINTS if point.task == task):
            file = RESULTS / f"{point.name}.json"
            if file.is_file():
                lines.append(_line(point, json.loads(file.read_text(encoding="utf-8")), reference))
    return lines


def _line(point: Trained | Rounded, result: dict[str, Any], reference: float) -> str:
    bits, size = (result["mean_bits"], result["weight_bytes"]) if isinstance(point, Rounded) else _size(result)
    loss = _loss(result)
    label = point.name.removeprefix(f"{point.task}-")
    change = f"{100 * (loss / reference - 1):+.2f} %"
    return f"| {point.task} | {label} | {bits:.2f} | {size / 1e6:.1f} | {loss:.4f} | {change} |"


def _size(result: dict[str, Any]) -> tuple[float, float]:
    """Mean width over weights and bytes of a run's linear layers, from its record's products."""
    counts = {p["module"]: p["k"] * p["n"] for p in result["costs"]["products"] if p["op"] == "linear"}
    widths = {module["name"]: module["bits"].get("weight", 32) for module in result["modules"]}
    weights = sum(counts[name] for name in widths)
    mean = sum(counts[name] * bits for name, bits in widths.items()) / weights
    form = result["recipe"]["adapter"]
    grid = Grid(form["group_size"], form.get("scale_bits", 32))
    return mean, 4 * weights if mean == 32 else stored_bytes(weights, mean, grid)


def _loss(result: dict[str, Any]) -> float:
    scores = result["scores"]
    if isinstance(scores, dict):
        return float(scores["loss"])
    return float(next(entry["value"] for entry in scores if entry["metric"] == "loss"))


def chosen(text: str) -> list[Trained | Rounded]:
    """The point of this name, or else all whose names contain it."""
    named = [point for point in POINTS if point.name == text]
    return named or [point for point in POINTS if text in point.name]


def main() -> int:
    """Work through the points that are missing, in order, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only points whose name contains this")
    parser.add_argument("--table", action="store_true", help="print the finished points and do nothing else")
    parser.add_argument("--list", action="store_true", help="print the names of all points, finished ones marked")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=Path("runs/decoder"), help="folder of runs and checkpoints")
    given = parser.parse_args()
    if given.list:
        print("\n".join(f"{'x' if (RESULTS / f'{p.name}.json').is_file() else ' '} {p.name}" for p in POINTS))
        return 0
    if not given.table:
        points = chosen(given.only)
        if not points:
            parser.error(f"no point's name contains {given.only!r}; --list shows their names")
        if not os.environ.get(DATA_VARIABLE):
            parser.error(f"{DATA_VARIABLE} is not set; it should name a folder that holds gsm8k/ and e2e_nlg/")
        torch.set_num_threads(given.threads)
        warnings.simplefilter("ignore", FutureWarning)
        for point in points:
            work(point, given.scratch)
    print("\n".join(table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
