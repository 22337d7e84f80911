"""What passes write and hold at once, by formula, against what the profiler sees them allocate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import sizes
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rankbits.accounting.activations import forward_bytes
from rankbits.accounting.architectures.read import Head, read_shape
from rankbits.accounting.memory import inference_memory
from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.spec import Method, MethodSpec, ModelShape

BATCH, LENGTH = 4, 64
FULL = MethodSpec(Method.FULL)


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes of each allocation (positive) and release (negative) while `run` runs, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    found = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    del held
    return [size for _, size in found]


def build(family: str) -> tuple[torch.nn.Module, ModelShape, dict[str, torch.Tensor]]:
    config: BertConfig | LlamaConfig
    if family == "bert":
        config = BertConfig(**sizes(hidden=128, layers=3, heads=2, wide=512, words=90))
        model: torch.nn.Module = BertForSequenceClassification(config)
    else:
        grouped = sizes(hidden=128, layers=3, heads=4, wide=384, words=90) | {"num_key_value_heads": 2}
        config = LlamaConfig(**grouped)
        model = LlamaForCausalLM(config)
    head = Head.CLASSIFICATION if family == "bert" else Head.LANGUAGE_MODEL
    ids = torch.randint(3, 90, (BATCH, LENGTH))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, read_shape(config.to_dict(), name=family, head=head), inputs


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_training_pass_writes_what_the_formula_says(family: str) -> None:
    model, shape, inputs = build(family)
    model.train()
    labels = torch.zeros(BATCH, dtype=torch.long) if family == "bert" else inputs["input_ids"]
    written = sum(size for size in allocations(lambda: model(**inputs, labels=labels)) if size > 0)
    found = forward_bytes(shape, FULL, TrainingSettings(batch=BATCH, sequence_length=LENGTH))
    assert found.kept + found.temporary + 2 * found.logits == pytest.approx(written, rel=0.15)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_pass_without_gradients_holds_about_what_the_formula_says(family: str) -> None:
    model, shape, inputs = build(family)
    model.eval()
    options = {"use_cache": True, "logits_to_keep": 1} if family == "llama" else {}
    with torch.no_grad():
        sizes = allocations(lambda: model(**inputs, **options))
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    found = inference_memory(shape, FULL, TrainingSettings(batch=BATCH, sequence_length=LENGTH))
    assert 0.85 <= (found.activations + found.logits + found.workspace) / peak <= 1.05
