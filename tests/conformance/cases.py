"""The rows that PEFT's tests run over: models, targets and configs of one method, and the skips that are legitimate."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import harness
import models
import pytest

REFUSED = "this config refuses to merge"

# Which skip is legitimate: name of the test -> what its reason must match. Any other skip is a failure.
ALLOWED_SKIPS: Mapping[str, str] = {
    "test_adding_multiple_adapters_with_bias_raises": "does not support the 'bias' argument",
    "test_disable_adapter_with_bias_warns": "Testing bias warnings only for LoraConfig or BOFTConfig",
    "test_active_adapter": "Multiple active adapters with modules_to_save",
    "test_mixed_adapter_batches": "Mixed adapter batches not supported",
    "test_generate_with_mixed_adapter_batches": "Mixed adapter batches not supported",
    "test_prompt_tuning_text_prepare_for_training": "This test does not apply to",
    "test_prompt_tuning_sample_vocab_prepare_for_training": "This test does not apply to",
    "test_training_prompt_learning_tasks": "Test not applicable for",
    "test_set_requires_grad_prompt_learning_raises": "This test is only for prompt learning methods",
    "test_weighted_combination_of_adapters": "Test not applicable for",
    "test_merge_unmerge_unload": "Bnb 4 bit quant with CPU results in high variance",
}


def allowed(test_name: str, reason: str) -> bool:
    """Whether this test may be skipped for this reason."""
    pattern = ALLOWED_SKIPS.get(test_name)
    return reason.endswith(REFUSED) or (pattern is not None and re.search(pattern, reason) is not None)


@dataclass(frozen=True)
class Method:
    """A config class in one of its modes.

    Args:
        config: the PEFT config class.
        kwargs: what every config of this mode is given.
        targets: two layers of upstream's MLP that can be adapted.
        saved: the module of the MLP that is trained in full.
        decoder: what decoder configs are given besides; an `r` that is not the default shows a field that is lost.
        quantized: what configs for a quantized base are given besides. Upstream tolerates so much noise there that
            only a large update can be missed.
        quantized_layers: how many layers of a block these configs adapt.
        not_identity: what starts the adapter away from the identity.
        conv1d: what the config for a transformers Conv1D is given besides; upstream's has 5 inputs and 1 output.
        both_active: whether two adapters may be active on one layer.
        drop: name of a group -> tests left out -> why.
        narrow: name of a group -> test -> parameter -> the values kept.
    """

    config: type
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, str] = ("lin0", "lin1")
    saved: str = "lin1"
    decoder: Mapping[str, Any] = field(default_factory=lambda: {"r": 4})
    quantized: Mapping[str, Any] = field(default_factory=lambda: {"r": 4})
    quantized_layers: int = 2
    not_identity: Mapping[str, Any] = field(default_factory=lambda: {"init_weights": False})
    conv1d: Mapping[str, Any] = field(default_factory=dict)
    both_active: bool = True
    drop: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    narrow: Mapping[str, Mapping[str, Mapping[str, Sequence[Any]]]] = field(default_factory=dict)

    def row(self, **kwargs: Any) -> dict[str, Any]:
        """Arguments of one config."""
        return {**self.kwargs, **kwargs}


def custom(method: Method) -> harness.Cases:
    """Targets as a string, as a list of two, with `modules_to_save`, and a transformers Conv1D."""
    first, second = method.targets
    saved = method.row(target_modules=[first], modules_to_save=[method.saved])
    rows = [
        ("string", "MLP", method.config, method.row(target_modules=first)),
        ("list of two", "MLP", method.config, method.row(target_modules=[first, second])),
        ("saved module", "MLP", method.config, saved),
        ("Conv1D", "EmbConv1D", method.config, method.row(**{"target_modules": ["conv1d"], **method.conv1d})),
    ]
    return harness.Cases((rows,), 40 * len(rows), method.drop.get("custom", {}), method.narrow.get("custom", {}))


def multi(method: Method) -> harness.Cases:
    """Two adapters on different layers and, where the method allows it, on the same one."""
    first, second = (method.row(target_modules=[target], **method.not_identity) for target in method.targets)
    rows = [("different layers", "any", method.config, first, second)]
    if method.both_active:
        rows.append(("same layer", "any", method.config, first, first))
    return harness.Cases((rows,), 5 * len(rows), method.drop.get("multi", {}), method.narrow.get("multi", {}))


def config(method: Method) -> harness.Cases:
    """The config class alone; the three tests that load a config from the hub are left out."""
    hub = ("test_from_pretrained", "test_from_pretrained_cache_dir", "test_save_pretrained_with_runtime_config")
    drop = dict.fromkeys(hub, "loads from the hub") | method.drop.get("config", {})
    return harness.Cases(([(method.config, dict(method.kwargs))],), 24, drop)


def decoder(method: Method) -> harness.Cases:
    """Two decoders, with the targets that PEFT knows for their model type."""
    row = method.row(task_type="CAUSAL_LM", **{"target_modules": None, **method.decoder})
    paths = [pytest.param(models.gated(), id="gated"), pytest.param(models.opt(), id="opt")]
    return harness.Cases(
        ([(method.config, row)], paths), 65, method.drop.get("decoder", {}), method.narrow.get("decoder", {})
    )


def quantization(method: Method) -> harness.Cases:
    """Every quantized base that PEFT's loaders can make of the tiny OPT without a download."""
    loaders = []
    for upstream_loader in harness.upstream("test_quantization").QUANTIZATION_BACKENDS:
        if upstream_loader.name != "gptq_4bit":
            loader = copy.copy(upstream_loader)
            loader.model_id, loader.expected_layer_count = models.opt(), method.quantized_layers * models.LAYERS
            loaders.append(loader)
    rows = [(method.config, method.row(**{"target_modules": ["q_proj", "v_proj"], **method.quantized}))]
    return harness.Cases(
        (rows, loaders), 12, method.drop.get("quantization", {}), method.narrow.get("quantization", {})
    )


GROUPS: Mapping[str, Callable[[Method], harness.Cases]] = {
    "custom": custom,
    "multi": multi,
    "config": config,
    "decoder": decoder,
    "quantization": quantization,
}


def classes(name: str, method: Method) -> dict[str, type]:
    """The five groups of one method, as test classes for a test module to hold, keyed by their names there."""
    return {f"Test{name}{group.title()}": harness.conformance(group, make(method)) for group, make in GROUPS.items()}
