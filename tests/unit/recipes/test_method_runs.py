"""Every method from recipe to record on tiny random models: trained, resumed, scored again, counted, estimated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_decoder import save_tiny_decoder
from tiny_encoder import save_tiny_encoder
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
)

from rankbits.accounting.params import base_parameters, count
from rankbits.errors import ModelError, RunFolderError
from rankbits.recipes.catalogue import method_names
from rankbits.recipes.load import load
from rankbits.recipes.question import from_recipe
from rankbits.recipes.run import evaluate, run
from rankbits.recipes.schema import Recipe
from rankbits.tuners.sbora import sbora_layers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
FOUR_BIT = ("qlora", "qdora", "qsbora")
QUICK = ("mora", "prompt")
"""Run by `make test`; each of the others takes some seconds too."""


def _need_what_holds_the_base(method: str) -> None:
    if method in FOUR_BIT:
        pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    save_tiny_encoder(folder / "encoder")
    save_tiny_decoder(folder / "decoder")
    for task in ("labels", "answers", "similarities"):
        (folder / task).mkdir()
    for split, size in (("train", 24), ("validation", 8), ("test", 6)):
        labels = [{"text": f"{split} film {i} {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(size)]
        answers = [{"question": f"{split} {i}?", "answer": "four"} for i in range(size)]
        pairs = [{"sentence1": f"{split} {i}", "sentence2": f"film {i}", "label": 3.0 + i % 3} for i in range(size)]
        for task, rows in (("labels", labels), ("answers", answers), ("similarities", pairs)):
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_a_regression_starts_at_the_mean_of_its_training_labels(work: Path) -> None:
    heads: list[Tensor] = []

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control: TrainerControl, **kwargs) -> None:
            heads.extend(p.detach().clone() for p in kwargs["model"].parameters() if p.shape == (1,))

    pairs = ["task.name=stsb", f"task.data={work / 'similarities'}"]
    recipe = _recipe(work, "lora", *pairs, "task.start_at_mean=true", output="similarities-run")
    run(recipe, command="", callbacks=[Start()])
    assert heads
    assert all(bias.item() == pytest.approx(4.0) for bias in heads)
    with pytest.raises(RunFolderError, match=r"differs in task\.start_at_mean \(True there, None here\)"):
        run(_recipe(work, "lora", *pairs, output="similarities-run"), command="")


def _recipe(work: Path, method: str, *changes: str, decoder: bool = False, output: str = "") -> Recipe:
    place = (
        ["task.name=gsm8k", f"task.data={work / 'answers'}", f"model={work / 'decoder'}", "task.max_length=32"]
        if decoder
        else [f"task.data={work / 'labels'}", f"model={work / 'encoder'}", "task.max_length=32"]
    )
    small = [
        "task.train_rows=null",
        "training.epochs=null",
        "training.max_steps=4",
        "training.batch_size=4",
        "training.logging_steps=2",
        "training.save_steps=2",
        "adapter.targets=null",
        "adapter.r=2",
        "adapter.calibration_passes=1",
        "adapter.prefix.virtual_tokens=3",
        "adapter.prompt.virtual_tokens=3",
        f"method={method}",
        f"output={work / (output or f'{method}-{decoder}')}",
    ]
    return load("quickstart", [*place, *small, *changes])


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in method_names()]
)
@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
def test_a_method_runs_is_scored_again_and_is_what_was_estimated(work: Path, method: str, decoder: bool) -> None:
    _need_what_holds_the_base(method)
    recipe, told = _recipe(work, method, decoder=decoder), []
    if method == "feature-based" and decoder:
        with pytest.raises(ModelError, match="tied to the table of embeddings cannot train without changing"):
            run(recipe, command="test")
        assert not Path(str(recipe.output)).exists()
        return
    record = run(recipe, command="test", announce=told.append)
    assert record.method == method
    assert record.training.steps == 4
    assert record.costs is not None, told
    again = {score.metric: score.value for score in evaluate(Path(str(recipe.output)))}
    assert again == {score.metric: pytest.approx(score.value, rel=1e-5) for score in record.scores}

    question = from_recipe(recipe)
    expected, found = count(question.shape, question.spec), record.parameters
    assert found.trainable == expected.trainable > 0
    assert (found.head, found.gates, found.ranges) == (expected.head, expected.gates, expected.ranges)
    beside = expected.trainable - expected.head - expected.base
    assert found.base == expected.base
    assert found.total == base_parameters(question.shape) + beside
    narrow = {weight.bits for weight in record.costs.weights if weight.operand == "W0"}
    assert (4 in narrow) == (method in FOUR_BIT)
    assert any("paged states exist on CUDA alone" in line for line in told) == (method in FOUR_BIT)


class _StopAt(TrainerCallback):
    """Ends a run as a power cut would, right behind a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control: TrainerControl, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


RESUMED = ["dora", "qlora", "mora", "qsbora", "multi-sbora", "dylora", "adalora", "houlsby", "prefix", "prompt"]


@pytest.mark.slow
@pytest.mark.parametrize("method", [*RESUMED, "full", "top-layer", "feature-based"])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(work: Path, method: str) -> None:
    _need_what_holds_the_base(method)
    whole = run(_recipe(work, method, output=f"{method}-whole"), command="test")
    broken = _recipe(work, method, output=f"{method}-broken")
    with pytest.raises(KeyboardInterrupt):
        run(broken, command="test", callbacks=[_StopAt(2)])
    resumed = run(broken, command="test")
    assert resumed.training.resumed
    assert resumed.training.train_loss == pytest.approx(whole.training.train_loss, rel=1e-6)
    assert resumed.scores == whole.scores


def test_dylora_is_scored_at_the_ranks_that_are_asked_for(work: Path) -> None:
    changes = ["adapter.r=4", "adapter.dylora.evaluation_rank=3", "adapter.dylora.evaluate_ranks=[1,4]"]
    record = run(_recipe(work, "dylora", *changes, output="ranks"), command="test")
    metrics = [score.metric for score in record.scores]
    assert metrics[0] == "accuracy"
    assert {metric for metric in metrics if metric.startswith("accuracy")} == {
        "accuracy",
        "accuracy at rank 1",
        "accuracy at rank 4",
    }
    assert [score.primary for score in record.scores].count(True) == 1
    assert {(module.rank, module.max_rank) for module in record.modules} == {(3, 4)}
    saved = json.loads((work / "ranks" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["evaluation_rank"] == 3


def test_virtual_tokens_need_positions_too(work: Path) -> None:
    recipe = _recipe(work, "prompt", "task.max_length=62", output="too-long")
    with pytest.raises(ModelError, match=r"given 62, but .* has 64 positions and 3 virtual tokens .* at most 61"):
        run(recipe, command="test")


def test_a_prompt_does_not_suit_a_decoder_s_classifier(work: Path) -> None:
    recipe = _recipe(work, "prompt", f"model={work / 'decoder'}", output="refused")
    with pytest.raises(ModelError, match="cannot tell from padding"):
        run(recipe, command="test")


@pytest.mark.slow
def test_adalora_ends_with_the_mean_rank_that_was_asked_for(work: Path) -> None:
    changes = ["adapter.r=2", "adapter.adalora.initial_rank=4", "adapter.alpha=6"]
    record = run(_recipe(work, "adalora", *changes, output="ranks-left"), command="test")
    assert sum(module.rank for module in record.modules) == 2 * len(record.modules)
    assert {module.max_rank for module in record.modules} == {4}
    saved = json.loads((work / "ranks-left" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (saved["init_r"], saved["target_r"], saved["total_step"]) == (4, 2, 4)
    assert saved["lora_alpha"] / saved["init_r"] == 6 / 2
    assert sum(sum(kept) for kept in saved["rank_pattern"].values()) == 2 * len(record.modules)


@pytest.mark.slow
def test_a_run_that_was_cut_behind_its_last_step_is_finished(work: Path) -> None:
    for method in ("adalora", "full"):
        whole = run(_recipe(work, method, output=f"{method}-to-the-end"), command="test")
        recipe = _recipe(work, method, output=f"{method}-cut-at-the-end")
        with pytest.raises(KeyboardInterrupt):
            run(recipe, command="test", callbacks=[_StopAt(4)])
        finished = run(recipe, command="test")
        assert finished.scores == whole.scores
        assert finished.modules == whole.modules


@pytest.mark.slow
def test_a_whole_model_is_saved_for_other_tools(work: Path) -> None:
    recipe = _recipe(work, "top-layer", output="whole")
    run(recipe, command="test")
    assert not (work / "whole" / "adapter").exists()
    model = AutoModelForSequenceClassification.from_pretrained(work / "whole" / "model")
    assert AutoTokenizer.from_pretrained(work / "whole" / "model")("a film")["input_ids"]
    before = AutoModel.from_pretrained(work / "encoder").state_dict()
    moved = {name for name, tensor in model.bert.state_dict().items() if not tensor.equal(before[name])}
    assert moved
    assert all(name.startswith("encoder.layer.1.") for name in moved), moved
    (work / "whole" / "model" / "model.safetensors").unlink()
    with pytest.raises(RunFolderError, match="cannot be loaded"):
        evaluate(work / "whole")


@pytest.mark.slow
def test_tasks_run_apart_meet_in_one_base_and_leave_it_one_by_one(work: Path) -> None:
    folders = {}
    for task, changes in {"one": (), "two": ("adapter.sbora.first=2", "training.seed=7")}.items():
        recipe = _recipe(work, "multi-sbora", *changes, output=task)
        run(recipe, command="test")
        folders[task] = Path(str(recipe.output)) / "adapter"
    base = AutoModelForSequenceClassification.from_pretrained(work / "encoder", num_labels=2)
    model = PeftModel.from_pretrained(base, folders["one"], adapter_name="one")
    model.load_adapter(folders["two"], adapter_name="two")
    layers = [layer for _, layer in sbora_layers(model)]
    assert all(len({*layer.indices_of("one"), *layer.indices_of("two")}) == 4 for layer in layers)

    def weights() -> list[Tensor]:
        return [layer.get_base_layer().weight.detach().clone() for layer in layers]

    def equal(some: list[Tensor], others: list[Tensor]) -> bool:
        return all(torch.equal(*pair) for pair in zip(some, others, strict=True))

    before = weights()
    model.merge_adapter(["two"])
    alone = weights()
    model.merge_adapter(["one"])
    both = weights()
    model.unmerge_adapter(["two"])
    assert not equal(weights(), before)
    model.merge_adapter(["two"])
    assert equal(weights(), both)
    model.unmerge_adapter(["one"])
    assert equal(weights(), alone)
    model.unmerge_adapter(["two"])
    assert equal(weights(), before)


@pytest.mark.slow
def test_a_task_that_does_not_say_where_it_begins_is_not_loaded_beside_another(work: Path) -> None:
    folders = []
    for task in ("first", "same"):
        recipe = _recipe(work, "multi-sbora", output=f"{task}-task")
        run(recipe, command="test")
        folders.append(Path(str(recipe.output)) / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(work / "encoder", num_labels=2)
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="first")
    with pytest.raises(
        ValueError, match=r"'same' was saved with rows or columns \[.*\] of '.*', which belong to 'first'"
    ):
        model.load_adapter(folders[1], adapter_name="same")


def test_a_task_that_does_not_fit_is_refused_before_anything_is_written(work: Path) -> None:
    recipe = _recipe(work, "multi-sbora", "adapter.sbora.first=31", output="too-many")
    with pytest.raises(ModelError, match=r"asks for r=2 rows or columns of '.*', of which 1 are left: of 32"):
        run(recipe, command="test")
    assert not (work / "too-many").exists()
