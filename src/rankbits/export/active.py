"""Which adapter of a model is exported: the one that is active, beside a base weight that is not changed."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from rankbits.errors import ExportError
from rankbits.tuners.bayesian_lora import BayesianLoraConfig


def active_adapter(model: nn.Module) -> str:
    """The name of the adapter that would be exported.

    Args:
        model: a PEFT model.

    Raises:
        ExportError: the model is not one of PEFT's, not exactly one adapter acts, it is merged, it adapts something
            else than weights, or its ranks and bits are not fixed yet.
    """
    if not isinstance(model, PeftModel):
        raise ExportError(f"a {type(model).__name__} was given, expected a PeftModel, as peft.get_peft_model makes it")
    if not isinstance(model.base_model, BaseTuner):
        raise ExportError(
            f"a {type(model.base_model).__name__} without adapters in its layers was given: what prompts and prefixes "
            "learn is no update of a weight, and PEFT's own save_pretrained writes it"
        )
    names = model.active_adapters
    if len(names) != 1:
        raise ExportError(
            f"the adapters {names} are active, expected exactly one: choose it with model.set_adapter(name)"
        )
    (name,) = names
    for layer_name, layer in tuner_layers(model):
        if layer.merged:
            raise ExportError(
                f"the adapters {layer.merged_adapters} are merged into {layer_name!r}: call model.unmerge_adapter() "
                "first, so that the base weights are known"
            )
        if layer.disable_adapters:
            raise ExportError(f"the adapters of {layer_name!r} are disabled: call model.enable_adapter_layers() first")
    config = model.peft_config[name]
    if isinstance(config, BayesianLoraConfig) and config.learns:
        raise ExportError(
            f"the ranks and bit widths of adapter {name!r} are not fixed yet: call rankbits.harden(model) first"
        )
    return name


def tuner_layers(model: PeftModel) -> Iterator[tuple[str, BaseTunerLayer]]:
    """All adapted layers of a model with their names in the base model, in module order."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module
