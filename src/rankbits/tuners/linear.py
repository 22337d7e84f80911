"""What all our mergeable tuners of linear layers share: life cycle, merging, dtypes and quantized bases."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Of weights that are what they say: those of 8 bits are nothing without scales that their layers keep elsewhere."""


class AdapterLinear(nn.Module, BaseTunerLayer, ABC):
    """A linear layer with adapters beside it.

    A method supplies its containers, `update_layer`, `adapted_forward` and `merged_weight`.

    Args:
        base_layer: `nn.Linear`, transformers' `Conv1D`, or a quantized linear layer that PEFT knows.
        adapter_name: the first adapter.
        config: its configuration.
        key: qualified name of the layer in the base model.
        quantization: what PEFT's backends need to re-quantize a merged weight.

    Raises:
        TypeError: the layer is of another type.
    """

    extra_repr = quantization_extra_repr

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: PeftConfig, key: str, quantization: dict[str, Any]
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        keep_layout(base)
        self.quantization_backend = resolve_quantization_backend(base, **quantization)
        self.is_transposed = isinstance(base, Conv1D)
        self.in_features, self.out_features = _features(base, key, quantized=self.quantization_backend is not None)
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.cast_input_dtype_enabled = True
        self._originals: list[Tensor] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.create_containers()
        self.update_layer(adapter_name, config, key)

    @abstractmethod
    def create_containers(self) -> None:
        """Create the empty per-adapter containers that the class attributes list."""

    @abstractmethod
    def update_layer(self, adapter_name: str, config: Any, key: str) -> None:
        """Add one adapter and activate what is active."""

    @abstractmethod
    def adapted_forward(self, x: Tensor) -> Tensor:
        """Output with the active adapters: [..., in_features] to [..., out_features]."""

    @abstractmethod
    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        """The weight [out_features, in_features], float32, that alone computes what base and adapter compute."""

    @abstractmethod
    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raise if merging these adapters would change what the layer computes."""

    def get_base_weight(self) -> Tensor:
        """The weight of the base layer as it stores it, dequantized if it is quantized."""
        weight: Tensor = super().get_base_weight()
        return weight

    def shape_to_save(self) -> Tensor:
        """[out_features, in_features], for adapters whose tensors have the same shapes in layers of other sizes."""
        return torch.tensor([self.out_features, self.in_features], device="cpu")

    def oriented(self, weight: Tensor) -> Tensor:
        """A base weight as [out_features, in_features], or such a weight as the base layer stores it."""
        return weight.T if self.is_transposed else weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output in the dtype of its input: [..., in_features] to [..., out_features]."""
        dtype = x.dtype
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs).to(dtype)  # type: ignore[no-any-return]
        if self.merged:
            return self.merged_forward(x, *args, **kwargs).to(dtype)
        return self.adapted_forward(x).to(dtype)

    def merged_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output with adapters written into the base weight: [..., in_features] to [..., out_features]."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base weight and keep the original for `unmerge`.

        Args:
            safe_merge: check that the merged weight is finite before storing it.
            adapter_names: which adapters; the active ones if None.

        Raises:
            MergeError: merging is not exact for this method or in its present configuration; nothing has changed.
            ValueError: `safe_merge` found NaN or infinite values; that adapter and later ones are not merged.
        """
        available = self._get_available_adapters()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in available]
        self.check_mergeable(names)
        for name in names:
            original = self.get_base_weight()
            with torch.no_grad():
                merged = self.oriented(self.merged_weight(name, self.oriented(original).to(torch.float32)))
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.set_base_weight(merged.to(original.dtype).contiguous())
            self._originals.append(original)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the original base weight back: bit for bit, except where a quantized base has to re-quantize it."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self.merged_adapters.pop()
            self.set_base_weight(self._originals.pop().to(self.get_base_weight().device))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Refuse every strength but 1, which diffusers' `set_adapters` sets where it is given none.

        Args:
            adapter: whose strength.
            scale: factor of its update.

        Raises:
            ValueError: `scale` is not 1; nothing has changed.
        """
        if scale != 1.0:
            raise ValueError(
                f"a strength of {scale} was given for {adapter!r}, but a {type(self).__name__} adds its update as it "
                "was trained: expected 1.0. As plain LoRA (rankbits.export, to='lora') it can be given any"
            )

    def scale_layer(self, scale: float) -> None:
        """The same for the active adapters, which diffusers' `fuse_lora` and the calls of its models ask for."""
        for adapter in self.active_adapters:
            self.set_scale(adapter, scale)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging the adapter would add to the base weight, in the base layer's shape and dtype."""
        weight = self.get_base_weight()
        full = self.oriented(weight).to(torch.float32)
        return self.oriented(self.merged_weight(adapter, full) - full).to(weight.dtype)


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from its kernel for evaluation on CPUs with AVX512-BF16, and undo what that did already.

    In its first pass that kernel rearranges the codes of a 4-bit weight and rounds the scales, in place. From then on
    whoever reads the weight (merging, PEFT's DoRA) gets its codes in the wrong order, and a layer that trains again
    passes no gradient on. Nor does it work where inputs do not fill whole blocks.

    Args:
        model: its 4-bit layers are changed in place: they compute what they train with, if slower.
    """
    layers: Iterator[Any] = model.modules()
    for layer in layers:
        if not getattr(layer, "support_avx512bf16_for_cpu", False):
            continue
        layer.support_avx512bf16_for_cpu = False
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            # Listing the state puts the codes back, by bitsandbytes' own inverse.
            layer.state_dict()


def _features(base: nn.Module, key: str, *, quantized: bool) -> tuple[int, int]:
    """(in_features, out_features) of a supported base layer."""
    if isinstance(base, Conv1D):
        return int(base.weight.shape[0]), int(base.weight.shape[1])
    if isinstance(base, nn.Linear) and not quantized and base.weight.dtype not in FLOATS:
        raise TypeError(
            f"target module {key!r} is a {type(base).__name__} with a weight of {base.weight.dtype}, which is on a "
            f"grid of its own that PEFT does not know: expected a weight of {', '.join(map(str, FLOATS))}"
        )
    if isinstance(base, nn.Linear) or quantized:
        return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
    raise TypeError(
        f"target module {key!r} is a {type(base).__name__}, which cannot be adapted: supported are torch.nn.Linear "
        "(also quantized by a backend PEFT knows) and transformers' Conv1D"
    )


class LinearTuner(BaseTuner, ABC):
    """A tuner that replaces linear layers by one class: `layer_class`, which PEFT knows as `tuner_layer_cls`."""

    layer_class: type[AdapterLinear]

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: Mapping[str, Any]) -> PeftConfig:
        # PEFT would fail on the key: a config of diffusers names no architecture whose usual layers could be meant.
        if getattr(peft_config, "target_modules", None) is None and "model_type" not in model_config:
            raise ValueError(
                "`target_modules`=None stands for the usual layers of an architecture, but "
                f"{type(self.model).__name__} names none: expected names of its linear layers, such as ['to_q', "
                "'to_k', 'to_v', 'to_out.0'] in attentions of diffusers, or 'all-linear'"
            )
        prepared: PeftConfig = super()._prepare_adapter_config(peft_config, dict(model_config))
        return prepared

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
        if isinstance(target, self.layer_class):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        layer = self.layer_class(target, adapter_name, peft_config, current_key, get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, but an adapter that cannot be put into some layer is taken out of those where it already is."""
        # Of layers that are not adapted, too: gradients pass through them.
        keep_layout(model)
        before = {name for name, _ in self._adapted_layers(model)}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            for name, layer in list(self._adapted_layers(model)):
                if name in before:
                    layer.delete_adapter(adapter_name)
                else:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, layer.get_base_layer())
            raise

    def _adapted_layers(self, model: nn.Module) -> Iterator[tuple[str, AdapterLinear]]:
        for name, module in model.named_modules():
            if isinstance(module, self.layer_class):
                yield name, module

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Of a module that was trained in full, its copy is all that stays; PEFT would hand it the weight that it has,
        # and fail where that is the weight of layers inside it.
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        entries: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        try:
            cls.check_saved(model, adapter_name, entries)
        except ValueError:
            # PEFT has put an empty adapter in by now, which must not stay beside those that were there.
            if len(getattr(model, "peft_config", ())) > 1:
                model.delete_adapter(adapter_name)  # type: ignore[operator]
            raise
        return entries

    @classmethod
    def check_saved(cls, model: nn.Module, adapter_name: str, entries: dict[str, Tensor]) -> None:
        """Check what is about to be loaded into an adapter.

        Args:
            model: with the adapter, as it starts.
            adapter_name: which adapter.
            entries: saved tensors by their names in the model.

        Raises:
            ValueError: a tensor of the method has no place in the model, or another shape there; a layer has other
                features than when it was saved, or nothing was saved for it.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        present = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
        problems = list(cls._other_features(model, adapter_name, entries))
        for name, saved in entries.items():
            if name not in present:
                # PEFT would leave it out without a word.
                problems += [f"{name} is not in it"] if cls.prefix in name else []
            elif (shape := present[name].shape) != saved.shape:
                problems.append(f"{name} was saved as {list(saved.shape)} and is {list(shape)} here")
        for name in parameters:
            if name.partition(cls.prefix)[2].split(".")[1:2] == [adapter_name] and name not in entries:
                problems.append(f"{name} was not saved")
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise ValueError(
                f"adapter {adapter_name!r} does not fit this model: {problems[0]}{more}. Load it onto the base model "
                "that it was trained on"
            )

    @classmethod
    def _other_features(cls, model: nn.Module, adapter_name: str, entries: dict[str, Tensor]) -> Iterator[str]:
        """What is wrong with the layers that an adapter was saved from, by `shape_to_save`."""
        end = f".{cls.prefix}shape.{adapter_name}"
        for name, module in model.named_modules():
            if isinstance(module, AdapterLinear) and name + end in entries:
                saved, here = entries[name + end].tolist(), [module.out_features, module.in_features]
                if saved != here:
                    yield f"{name}.weight was saved as {saved} and is {here} here"

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters into the base weights.

        Args:
            adapter_names: which of them; the active ones if None.
            safe_merge: check that merged weights are finite.

        Raises:
            ValueError: there is no adapter of one of the names; nothing has changed.
        """
        unknown = sorted(set(adapter_names or ()) - set(self.peft_config))
        if unknown:
            raise ValueError(f"adapters {unknown} cannot be merged: the model has {sorted(self.peft_config)}")
        super().merge_adapter(adapter_names, safe_merge)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # Without this hook PEFT would ignore the argument and answer every row with the active adapter.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={kwargs['adapter_names']!r} was given, but {type(self).__name__} cannot mix adapters "
                "in one batch: run one batch per adapter with set_adapter(name)"
            )
        yield
