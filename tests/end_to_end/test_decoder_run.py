"""A language model from recipe to record: a tiny random Llama learns made-up answers, and is scored on them alone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "tiny"))

from tiny_decoder import save_tiny_decoder

from rankbits.errors import RunFolderError
from rankbits.recipes.load import load
from rankbits.recipes.run import evaluate, run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _recipe(folder: Path, method: str, *changes: str):
    return load(
        "gsm8k-smollm2",
        [
            f"model={folder / 'model'}",
            f"task.data={folder / 'data'}",
            f"method={method}",
            "task.max_length=64",
            "training.max_steps=12",
            "training.batch_size=4",
            "training.learning_rate=5e-2",
            "training.logging_steps=2",
            "adapter.r=4",
            "adapter.calibration_passes=2",
            f"output={folder / method}",
            *changes,
        ],
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    save_tiny_decoder(folder / "model")
    (folder / "data").mkdir()
    for split, count in (("train", 24), ("test", 6)):
        rows = [{"question": f"{split} {i}?", "answer": "four"} for i in range(count)]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("method", ["lora", "bayesian-lora"])
def test_all_linear_layers_of_the_blocks_learn_the_answer(work: Path, method: str) -> None:
    record = run(_recipe(work, method), command="test")
    assert {(score.metric, score.split, score.primary) for score in record.scores} == {
        ("loss", "test", True),
        ("perplexity", "test", False),
    }
    loss, perplexity = (score.value for score in record.scores)
    assert perplexity == pytest.approx(math.exp(loss))
    # 257 equally likely bytes cost 5.55 nats each; the answer is the same in every row.
    assert loss < 4.0
    assert {module.kind for module in record.modules} == LINEARS
    assert len(record.modules) == 2 * len(LINEARS)
    config = json.loads((work / method / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "CAUSAL_LM"
    assert record.parameters.head == 0


def test_a_finished_run_is_scored_as_its_record_says(work: Path) -> None:
    record = run(_recipe(work, "lora"), command="test")
    scores = {score.metric: score.value for score in evaluate(work / "lora")}
    assert scores == {score.metric: pytest.approx(score.value, rel=1e-5) for score in record.scores}


def test_a_language_model_is_not_scored_on_labels(work: Path) -> None:
    run(_recipe(work, "lora"), command="test")
    with pytest.raises(RunFolderError, match="trained on 'gsm8k'; task 'mrpc' needs the head of a classifier"):
        evaluate(work / "lora", task="mrpc")
