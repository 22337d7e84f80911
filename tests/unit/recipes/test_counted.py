"""Estimates follow the settings of single methods: as many parameters as the attached model trains, the same base."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import TaskType
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from rankbits.accounting.params import count
from rankbits.accounting.predict import predict
from rankbits.accounting.spec import Method
from rankbits.recipes import facts
from rankbits.recipes.load import load
from rankbits.recipes.methods import attach
from rankbits.recipes.question import Question, from_recipe

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
SETTINGS = {
    "rslora": ["adapter.r=3"],
    "dora": ["adapter.r=3", "adapter.targets=all-linear"],
    "mora": ["adapter.r=2", "adapter.mora.type=sharing", "adapter.mora.rounding=floor"],
    "sbora-fa": ["adapter.r=5", "adapter.modules_to_save=[SAVED]"],
    "sbora-fb": ["adapter.r=5"],
    "multi-sbora": ["adapter.r=5", "adapter.sbora.variant=fb", "adapter.targets=all-linear"],
    "dylora": ["adapter.r=4", "adapter.dylora.evaluation_rank=2"],
    "houlsby": ["adapter.bottleneck.reduction_factor=3"],
    "pfeiffer": ["adapter.bottleneck.size=5"],
    "parallel": ["adapter.bottleneck.reduction_factor=100"],
    "prefix": ["adapter.prefix.virtual_tokens=7", "adapter.modules_to_save=[SAVED]"],
    "prompt": ["adapter.prompt.virtual_tokens=6", "adapter.prompt.init=random"],
}


def _question(method: str, *changes: str, model: str = "minilm") -> Question:
    return from_recipe(load("quickstart", [f"method={method}", "adapter.targets=null", f"model={model}", *changes]))


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("decoder", [False, True], ids=["bert", "llama"])
def test_as_many_parameters_are_trained_as_estimated(method: str, decoder: bool, tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=2) if decoder else BertConfig(**SIZES, num_labels=2)
    config.save_pretrained(tmp_path)
    saved = "lm_head" if decoder else "pooler"
    task = ["task.name=gsm8k", "task.max_length=16"] if decoder else ["task.max_length=16"]
    changes = [change.replace("SAVED", saved) for change in SETTINGS[method]]
    recipe = load("quickstart", [f"method={method}", "adapter.targets=null", f"model={tmp_path}", *task, *changes])
    maker = AutoModelForCausalLM if decoder else AutoModelForSequenceClassification
    model = attach(recipe, maker.from_config(config), TaskType.CAUSAL_LM if decoder else TaskType.SEQ_CLS)
    question = from_recipe(recipe)
    expected, found = count(question.shape, question.spec), facts.parameters(model)
    assert (found.trainable, found.head) == (expected.trainable, expected.head)


@pytest.mark.parametrize(
    ("method", "changes", "base"),
    [
        ("qlora", [], "nf4-double"),
        ("qdora", ["adapter.nf4.double_quantization=false"], "nf4"),
        ("qsbora", ["training.precision=bf16"], "nf4-double"),
        ("lora", ["adapter.nf4.double_quantization=false"], "fp32"),
    ],
)
def test_the_base_is_held_as_the_method_holds_it(method: str, changes: list[str], base: str) -> None:
    assert _question(method, *changes).settings.base == base


def test_the_variant_of_qsbora_decides_what_is_counted() -> None:
    assert _question("qsbora").spec.method is Method.QSBORA_FA
    assert _question("qsbora", "adapter.sbora.variant=fb").spec.method is Method.QSBORA_FB


def test_dylora_runs_at_the_rank_it_is_evaluated_at() -> None:
    whole, half = (
        predict(question.shape, question.options.model_copy(update={"adapters": "unmerged"}), question.spec)
        for question in (_question("dylora"), _question("dylora", "adapter.dylora.evaluation_rank=4"))
    )
    assert whole.macs - whole.reference_macs == 2 * (half.macs - half.reference_macs) > 0


def test_settings_of_other_methods_are_not_counted() -> None:
    others = ["adapter.mora.type=sharing", "adapter.bottleneck.size=3", "adapter.dylora.evaluation_rank=1"]
    plain, crowded = _question("lora"), _question("lora", *others)
    assert count(plain.shape, plain.spec) == count(crowded.shape, crowded.spec)
    assert crowded.spec.ranks == {}
