"""What was estimated and what then is: parameters and files of attached models, and what an estimate imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
)

from rankbits import GateSchedule, tasks
from rankbits.recipes import facts
from rankbits.recipes.estimate import Estimate, estimate
from rankbits.recipes.load import load
from rankbits.recipes.methods import attach
from rankbits.recipes.models import load_classifier
from rankbits.recipes.question import from_recipe
from rankbits.recipes.schema import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SOURCE = Path(__file__).resolve().parents[2] / "src"
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "sklearn", "scipy", "matplotlib")
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
DEBERTA = SIZES | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"], "pad_token_id": 0}
DISTILBERT = {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40}
MODELS: dict[str, PretrainedConfig] = {
    # The names of ten layers and more are longer, and so is the file's header.
    "bert": BertConfig(**SIZES | {"num_hidden_layers": 11}),
    "deberta": DebertaV2Config(**DEBERTA, share_att_key=True, norm_rel_ebd="layer_norm", type_vocab_size=0),
    "distilbert": DistilBertConfig(**DISTILBERT),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0),
    "roberta": RobertaConfig(**SIZES),
}
CASES = {
    "as shipped": ("minilm", []),
    "all linear layers, one rank": ("bert", ["adapter.targets=all-linear", "adapter.r=1"]),
    "modules to save": ("bert", ["adapter.modules_to_save=[pooler,LayerNorm]"]),
    "a target that is saved": ("bert", ["adapter.targets=[query,dense]", "adapter.modules_to_save=[pooler.dense]"]),
    "bits alone": ("bert", ["adapter.learn_rank=false"]),
    "ranks alone": ("bert", ["adapter.learn_bits=false"]),
    "few quantizers": ("bert", ["adapter.quantizers=[input,up]"]),
    "a quantized attention": ("bert", ["adapter.targets=[query,key,value]", "adapter.quantize_attention=true"]),
    "a quantized head": ("bert", ["adapter.modules_to_save=[pooler]", "adapter.quantize_head=true"]),
    "a quantized head of two layers": (
        "roberta",
        ["adapter.targets=[key]", "adapter.r=3", "adapter.quantize_head=true", "adapter.granularity=channel"],
    ),
    "usual targets": ("deberta", ["adapter.targets=null"]),
    "two modules named classifier": ("distilbert", ["adapter.targets=[q_lin,lin1]"]),
    "a head of two layers": ("roberta", ["adapter.targets=[key]", "adapter.r=3"]),
    "a decoder": ("llama", ["adapter.targets=[q_proj,v_proj]", "adapter.modules_to_save=[norm]"]),
    "a pattern": ("llama", ["adapter.targets=.*layers\\.[01]\\.mlp\\..*_proj", "task.max_length=40"]),
}


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory):
    """Makes a recipe of a case, its estimate, and the model that its run would train."""

    def attached(case: str, method: str) -> tuple[Recipe, Estimate, PeftModel]:
        name, changes = CASES[case]
        folder = tmp_path_factory.mktemp("model")
        if name in MODELS:
            MODELS[name].save_pretrained(folder)
            changes = [f"model={folder}", "task.max_length=32", *changes]
        recipe = load("quickstart", [f"method={method}", *changes])
        torch.manual_seed(0)
        if name in MODELS:
            config = MODELS[name]
            config.num_labels = 2
            base = AutoModelForSequenceClassification.from_config(config)
        else:
            base = load_classifier(recipe.model, tasks.get(recipe.task.name))
        return recipe, estimate(from_recipe(recipe)), attach(recipe, base)

    return attached


@pytest.mark.parametrize("method", ["bayesian-lora", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_parameters_and_files_are_what_was_estimated(attached, tmp_path: Path, case: str, method: str) -> None:
    _, answer, model = attached(case, method)
    record = facts.parameters(model)
    counts = answer.counts
    assert counts.trainable == record.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (counts.adapter + counts.diagonal, counts.gates, counts.ranges, counts.head) == (
        record.adapter,
        record.gates,
        record.ranges,
        record.head,
    )
    assert answer.base_parameters + counts.trainable - counts.head == record.total
    if method == "bayesian-lora":
        GateSchedule(model, 1).step()  # A model that never learned is saved with a warning.
    model.save_pretrained(tmp_path)
    assert answer.artefacts["weights"] == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_the_base_is_what_was_estimated_and_merging_leaves_no_more(attached) -> None:
    _, answer, model = attached("modules to save", "lora")
    merged = model.merge_and_unload()
    assert sum(p.numel() for p in merged.parameters()) == answer.base_parameters == answer.effective["merged"]


def _fresh(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["llama3-8b", "sequence_length=512", "method=qlora"],
        ["llama3-8b", "sequence_length=512", "--budget", "bits=4", "--products"],
        ["quickstart", "--json"],
    ],
    ids=["a model", "a budget and products", "a recipe"],
)
def test_an_estimate_is_quick_and_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import json, sys, time
from typer.testing import CliRunner
from rankbits.cli.main import app
runner, arguments = CliRunner(), ["estimate", *{arguments!r}]
runner.invoke(app, arguments)  # brings the imports
start = time.perf_counter()
result = runner.invoke(app, arguments)
seconds = time.perf_counter() - start
heavy = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps([result.exit_code, len(result.stdout) > 500, heavy, seconds]))
"""
    answer = _fresh(code)
    assert answer.returncode == 0, answer.stderr
    exit_code, has_text, heavy, seconds = json.loads(answer.stdout)
    assert (exit_code, has_text, heavy) == (0, True, [])
    assert seconds < 2
