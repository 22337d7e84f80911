"""The bottleneck tuner: what PEFT calls to put adapters at the ends of sub-layers, and to take them out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from torch import nn

from rankbits.tuners.bottleneck.config import BottleneckConfig, Kind
from rankbits.tuners.bottleneck.layer import BottleneckLinear
from rankbits.tuners.bottleneck.neighbours import neighbours_of, refuse_copies
from rankbits.tuners.bottleneck.placement import KNOWN, Layout, layout_of
from rankbits.tuners.linear import LinearTuner


class BottleneckModel(LinearTuner):
    """A model with bottleneck adapters in its sub-layers; made by `peft.get_peft_model`."""

    prefix = "bottleneck_"
    layer_class = BottleneckLinear
    tuner_layer_cls = BottleneckLinear

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: Mapping[str, Any]) -> PeftConfig:
        """Write the places of the model's architecture into the config, where the user named none."""
        assert isinstance(peft_config, BottleneckConfig)
        layout = layout_of(model_config)
        kind = Kind(peft_config.kind)
        named = peft_config.target_modules is not None
        if peft_config.feed_forward is None and (kind is Kind.PFEIFFER or (kind is Kind.PARALLEL and not named)):
            peft_config.feed_forward = _known(layout, model_config, peft_config).feed_forward
        if not named:
            _target(peft_config, layout, model_config)
        if peft_config.train_layernorm:
            norms = _known(layout, model_config, peft_config).norms
            peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or ()), *norms})
        refuse_copies(self.model, peft_config.modules_to_save or ())
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, BottleneckConfig)
        neighbours = neighbours_of(self.model, peft_config, current_key, target)
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)
        layer = getattr(parent, target_name)
        layer.connect(adapter_name, neighbours)


def _known(layout: Layout | None, model_config: Mapping[str, Any], config: BottleneckConfig) -> Layout:
    if layout is not None:
        return layout
    kind = Kind(config.kind)
    name = "target_modules=[...]" if kind is Kind.HOULSBY else "target_modules=[...] and feed_forward={...}"
    name = "modules_to_save=[...]" if config.train_layernorm and config.target_modules is not None else name
    raise ValueError(
        f"no places of kind={kind.value!r} are known for model_type={model_config.get('model_type')!r}; known are "
        f"{', '.join(KNOWN)}: say where they are with {name}"
    )


def _target(config: BottleneckConfig, layout: Layout | None, model_config: Mapping[str, Any]) -> None:
    """Choose the layers of an architecture, or those of the feed-forward that the user described."""
    kind = Kind(config.kind)
    if config.feed_forward is not None and (layout is None or config.feed_forward["output"] != layout.output):
        config.target_modules = {config.feed_forward["output"]}  # type: ignore[assignment]
        return
    layout = _known(layout, model_config, config)
    ends = {layout.output, layout.attention_output} if kind is Kind.HOULSBY else {layout.output}
    without = set() if kind is Kind.HOULSBY else set(layout.not_output)
    if model_config.get("add_cross_attention"):
        without |= layout.not_attention
    config.target_modules = ends  # type: ignore[assignment]
    if without:
        config.exclude_modules = _joined(config.exclude_modules, without)


def _joined(given: Any, without: set[str]) -> Any:
    """What the user excludes and what the placement excludes, in the user's form."""
    if not isinstance(given, str):
        return {*(given or ()), *without}
    ours = "|".join(re.escape(name) for name in sorted(without))
    return rf"(?:{given})|(?:(?:.*\.)?(?:{ours}))"
