"""A run from recipe to record on the embedded model: finished, refused, and continued after its last step."""

from __future__ import annotations

import json

import pytest

from rankbits.errors import RunFolderError
from rankbits.recipes.load import load
from rankbits.recipes.run import run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]


def _recipe(folder, *changes):
    return load(
        "quickstart",
        [
            f"task.data={folder / 'data'}",
            "task.train_rows=null",
            "training.max_steps=6",
            "training.batch_size=4",
            "training.logging_steps=2",
            f"output={folder / 'run'}",
            *changes,
        ],
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    (folder / "data").mkdir()
    for split, count in (("train", 24), ("validation", 8)):
        rows = [
            {"text": f"{split} film number {i} was {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(count)
        ]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder, run(_recipe(folder), command="first")


def test_a_finished_run_is_not_repeated(work):
    folder, record = work
    assert run(_recipe(folder), command="second") == record


def test_the_record_holds_what_a_forward_pass_costs(work):
    folder, record = work
    costs = record.costs
    length = _recipe(folder).task.max_length
    assert (costs.options.query_len, costs.options.key_len) == (length, length)
    assert costs.options.adapters == "unmerged", "quantized activations cannot be merged"
    assert costs.adapter_share > 0
    by_matrix = {module.name: module for module in record.modules}
    products = {(p.module, p.op): p for p in costs.products}
    for name, module in by_matrix.items():
        assert products[name, "linear"].bits_right == module.bits["weight"]
        assert products[name, "lora_down"].n == module.rank


def test_the_folder_of_another_recipe_is_refused_and_untouched(work):
    folder, record = work
    with pytest.raises(RunFolderError, match=r"training\.seed \(42 there, 7 here\)"):
        run(_recipe(folder, "training.seed=7"), command="other")
    assert json.loads((folder / "run" / "record.json").read_text())["seed"] == record.seed


def test_a_run_stopped_after_its_last_step_is_finished_without_another_one(work):
    folder, record = work
    (folder / "run" / "record.json").unlink()
    again = run(_recipe(folder), command="again")
    assert again.training.resumed
    assert again.training.steps == record.training.steps == 6
    assert again.training.train_loss == record.training.train_loss
    assert (again.scores, again.modules) == (record.scores, record.modules)
