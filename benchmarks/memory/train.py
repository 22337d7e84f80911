"""One short training run with the stock Trainer, whose last line of output is the process's peak resident bytes."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from run import LENGTH, RANK, STEPS, TARGETS
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from rankbits import BayesianLoraConfig, RankbitsCallback
from rankbits.recipes import models

NO_SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
VOCABULARY = {"none": 100, "minilm": 30522, "smollm2": 49152}


def base_model(name: str, weights: str, attention: str) -> Any:
    """The model to train, in float32."""
    settings = {"dtype": torch.float32, "attn_implementation": attention}
    if name == "none":
        return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY[name], **NO_SIZE))
    if name == "minilm":
        return AutoModelForSequenceClassification.from_pretrained(models.resolve(name), num_labels=2, **settings)
    return AutoModelForCausalLM.from_pretrained(weights, **settings)


def adapted(model: Any, name: str, method: str) -> Any:
    """The model with the method's adapters on q, k and v."""
    language_model = name == "smollm2"
    shared = {
        "r": RANK,
        "target_modules": list(TARGETS["smollm2" if language_model else "minilm"]),
        "modules_to_save": None if language_model else ["classifier"],
        "task_type": "CAUSAL_LM" if language_model else "SEQ_CLS",
    }
    if method == "lora":
        return get_peft_model(model, LoraConfig(**shared))
    if method == "bayesian-lora":
        # All steps but the first run with quantizers.
        return get_peft_model(model, BayesianLoraConfig(calibration_passes=1, **shared))
    return model


def rows(name: str, count: int) -> list[dict[str, Any]]:
    """Rows of equal length, without padding."""
    found: list[dict[str, Any]] = []
    length = LENGTH if name != "none" else 8
    for _ in range(count):
        ids = torch.randint(5, VOCABULARY[name], (length,)).tolist()
        labels: Any = ids if name == "smollm2" else 0
        found.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return found


def peak_bytes() -> int:
    """Largest resident set of this program; getrusage would count its parent too."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads VmHWM from /proc/self/status, which only Linux has")


def main() -> None:
    """Train for a few steps and print the peak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("method")
    parser.add_argument("batch", type=int)
    parser.add_argument("--variant", default="")
    parser.add_argument("--weights", default="")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    attention = "eager" if given.variant == "eager-attention" else "sdpa"
    model = adapted(base_model(given.model, given.weights, attention), given.model, given.method)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            max_steps=STEPS,
            per_device_train_batch_size=given.batch,
            save_strategy="no",
            disable_tqdm=True,
            activation_checkpointing=given.variant == "checkpointing",
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows(given.model, given.batch * STEPS),
            data_collator=lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]},
            callbacks=[RankbitsCallback()] if given.method == "bayesian-lora" else None,
        )
        trainer.train()
    print(peak_bytes())


if __name__ == "__main__":
    main()
