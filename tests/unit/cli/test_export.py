"""`rankbits export` on a finished run: both formats, what is said, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
)
from typer.testing import CliRunner

from rankbits import BayesianLoraConfig
from rankbits.cli.main import app
from rankbits.recipes.load import load
from rankbits.records import RunRecord

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore:.*missing from the checkpoint.*"
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "was", "has", "to", "the", "."]


def _export(*arguments: object):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def _finish(folder: Path, config: PeftConfig, record: RunRecord) -> Path:
    """A run folder as a run leaves it, with a small base model of its own."""
    torch.manual_seed(0)
    (folder / "base").mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder / "base")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder / "base")
    recipe = load("quickstart", [f"model={folder / 'base'}", "adapter.targets=[query]", f"output={folder / 'run'}"])
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    record.write(run / "record.json")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    get_peft_model(base, config).save_pretrained(run / "adapter")
    return run


@pytest.fixture
def run(tmp_path: Path, finished) -> Path:
    settings = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS", "init_weights": False}
    config = BayesianLoraConfig(learn_bits=False, learn_rank=False, **settings)
    return _finish(tmp_path, config, finished())


def test_both_formats_are_written_verified_and_loaded_without_rankbits_layers(run: Path) -> None:
    result = _export(run, "--to", "lora")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"lora: {run / 'lora'}"
    assert lines[1].startswith("reloaded with peft ")
    assert json.loads((run / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    other = run.parent / "elsewhere"
    result = _export(run, "--to", "merged", "--output", other)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == f"merged: {other}"

    tokens = AutoTokenizer.from_pretrained(other)("what was the", return_tensors="pt")
    base = AutoModelForSequenceClassification.from_pretrained(run.parent / "base")
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, run / "lora").eval()(**tokens).logits
        merged = AutoModelForSequenceClassification.from_pretrained(other).eval()(**tokens).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-5, atol=1e-6)


def test_refusals_are_one_message_before_anything_is_loaded(run: Path, tmp_path: Path) -> None:
    result = _export(run, "--to", "onnx")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.strip() == "error: to='onnx' is no format that can be written: expected one of lora, merged"
    result = _export(tmp_path / "nothing", "--to", "lora")
    assert result.exit_code == 2
    assert "holds no finished run: recipe.yaml is missing" in result.stderr
    result = _export(run, "--to", "merged", "--output", run)
    assert result.exit_code == 2
    assert "is not empty" in result.stderr
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "recipe.yaml", "record.json"]


def test_an_adapter_that_does_not_fit_is_refused(run: Path) -> None:
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
    result = _export(run, "--to", "lora")
    assert result.exit_code == 2
    assert "adapter cannot be loaded onto" in result.stderr


def test_the_format_has_to_be_named(run: Path) -> None:
    result = _export(run)
    assert result.exit_code == 2
    assert "--to" in result.stderr


def test_a_run_without_adapters_has_its_whole_model_already(tmp_path, finished) -> None:
    run = _finish(tmp_path, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), finished())
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"method": "full"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "base").rename(run / "model")
    (tmp_path / "base").symlink_to(run / "model")
    result = _export(run, "--to", "merged")
    assert result.exit_code == 2
    assert "was fine-tuned without adapters (full)" in result.stderr
    assert not (run / "merged").exists()
