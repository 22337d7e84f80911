"""Loading the pre-trained model and tokenizer that a recipe names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from rankbits.embedded import locate
from rankbits.errors import ModelError
from rankbits.recipes.catalogue import EMBEDDED_MODELS
from rankbits.recipes.converted import converted_folder
from rankbits.tasks import Task
from rankbits.tuners.linear import keep_layout

EMBEDDED = {model.name: model.file for model in EMBEDDED_MODELS}
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


def resolve(model: str) -> str:
    """The folder or hub id behind a recipe's model name.

    Raises:
        AssetError: an embedded model is not installed, is not the file it should be, or cannot be converted.
        ModelError: a local folder has no configuration or no weights.
    """
    if model in EMBEDDED:
        file = EMBEDDED[model]
        return str(converted_folder(file) if file.path.endswith(".gguf") else locate(file).parent)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model
    if not (folder / "config.json").is_file():
        raise ModelError(f"model: {model!r} is a folder without config.json, so it holds no transformers model")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        raise ModelError(
            f"model: the folder {model!r} holds no weights: expected one of {', '.join(WEIGHT_PATTERNS)} beside "
            "config.json"
        )
    return str(folder)


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model. ModelError if there is none."""
    return _loaded(AutoTokenizer.from_pretrained, model, "tokenizer")


def load_model(model: str, task: Task, quantization: BitsAndBytesConfig | None = None) -> PreTrainedModel:
    """The model with the head that a task needs, in float32 or with linear layers in 4 bits.

    Args:
        model: as a recipe names it.
        task: decides the head.
        quantization: how the weights of linear layers are held; None leaves them in float32.

    Raises:
        AssetError, ModelError: the model cannot be found or loaded, or has no head for the task.
    """
    if task.kind == "completion":
        return load_language_model(model, quantization)
    return load_classifier(model, task, quantization)


def load_language_model(model: str, quantization: BitsAndBytesConfig | None = None) -> PreTrainedModel:
    """The model with the head it was pre-trained with, which predicts the next token.

    Arguments are those of `load_model`.

    Raises:
        AssetError, ModelError: the model cannot be found or loaded, or has no such head.
    """
    loaded, found = _load_weights(AutoModelForCausalLM.from_pretrained, model, quantization)
    _refuse_missing(loaded, model, found["missing_keys"])
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"model: {model!r} has no trained head of a language model: {missing[0]!r} is missing from its weights; "
            "expected a decoder, such as smollm2, for a task whose answers are completed"
        )
    # Keys and values of past tokens are of use in generation alone, and checkpointing refuses them.
    loaded.config.use_cache = False
    return loaded


def load_classifier(model: str, task: Task, quantization: BitsAndBytesConfig | None = None) -> PreTrainedModel:
    """The model with a fresh head for the task.

    Args:
        model: as a recipe names it.
        task: decides the size of the head and the kind of loss.
        quantization: how the weights of linear layers are held; None leaves them in float32.

    Raises:
        AssetError, ModelError: the model cannot be found or loaded.
    """
    config = _loaded(AutoConfig.from_pretrained, model, "configuration")
    config.num_labels = task.num_labels
    config.problem_type = "regression" if task.kind == "regression" else "single_label_classification"
    if task.label_names:
        config.id2label = dict(enumerate(task.label_names))
        config.label2id = {name: number for number, name in config.id2label.items()}
    loaded, found = _load_weights(
        AutoModelForSequenceClassification.from_pretrained, model, quantization, config=config
    )
    _refuse_missing(loaded, model, found["missing_keys"])
    return loaded


def start_head_at(model: PreTrainedModel, value: float) -> None:
    """Let a fresh head of one output start around a value.

    A head that starts at zero first moves by as much as the labels lie away from it, in steps that all of its inputs
    take together: they saturate, and how long training stands there differs from seed to seed by many steps.

    Args:
        model: with a head for regression, in place.
        value: in the units of the labels.

    Raises:
        ModelError: the head has no bias.
    """
    body = set(model.base_model.modules())
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1 and m not in body]
    if not layers or layers[-1].bias is None:
        raise ModelError(
            f"task.start_at_mean: given true, but the head of {type(model).__name__} has no bias to start at "
            f"{value:.4g}; expected false with this model"
        )
    with torch.no_grad():
        layers[-1].bias.fill_(value)


def _load_weights(
    load: Any, model: str, quantization: BitsAndBytesConfig | None, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model, in float32 where it is not quantized, and what transformers found in its files."""
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    # A classifier's head is fresh on purpose: transformers' table of missing head weights would alarm for nothing.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded, found = _loaded(load, model, "weights", dtype=torch.float32, output_loading_info=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    keep_layout(loaded)
    return cast(PreTrainedModel, loaded), found


def _refuse_missing(loaded: PreTrainedModel, model: str, missing: Iterable[str]) -> None:
    """Raise ModelError if weights of the body, and not just of a head, would be random."""
    body = [k for k in sorted(missing) if k.startswith(f"{loaded.base_model_prefix}.") and "pooler" not in k]
    if body:
        raise ModelError(
            f"model: the weights of {model!r} are of another model: {len(body)} of the tensors its configuration asks "
            f"for are missing, such as {body[0]!r}"
        )


def _loaded(load: Any, model: str, what: str, **kwargs: Any) -> Any:
    source = resolve(model)
    try:
        return load(source, **kwargs)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as reason:
        first_line = str(reason).strip().splitlines()[0] if str(reason).strip() else type(reason).__name__
        raise ModelError(
            f"model: the {what} of {model!r} cannot be loaded: {first_line}. Expected {', '.join(EMBEDDED)}, the id of "
            "a model on the hub, or a local folder with config.json, weights and tokenizer"
        ) from reason
