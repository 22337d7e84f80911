"""Quantized heads: linear layers that are trained in full beside the adapters, with learned widths of their own.

The paper quantizes the linear layers of the head as well (Bayesian-LoRA, section 4.2). They have no low-rank update:
y = Q_x(x) Q_w(W)^T + b, and W is trained through the rounding, straight-through. PEFT keeps one trained copy of such a
module for each adapter, so that a layer in a copy belongs to exactly one adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from rankbits.quant.fixed_quantizer import FixedQuantizer
from rankbits.quant.grid import bits_of_gates
from rankbits.quant.quantizer import Quantizer
from rankbits.tuners.bayesian_lora.adapters import GatePhase
from rankbits.tuners.bayesian_lora.config import BayesianLoraConfig, RankGate, Site
from rankbits.tuners.bayesian_lora.layer_gates import LayerGates
from rankbits.tuners.bayesian_lora.start import fixed_quantizers, learning_quantizer, without_groups

HEAD_SITES = (Site.WEIGHT, Site.INPUT)
"""The tensors of a head's linear layer that have a quantizer, in the order of `Site`."""
STATE = ("head_gates", "head_quantizers")
"""Names of what a quantized head holds beside weight and bias, in its checkpoint too."""
LATE_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Heads that PEFT trains in full without being told, but names only after the adapters are in place."""


class QuantizedHeadLinear(nn.Linear):
    """A linear layer of a trained copy of a head, with quantizers for its weight and its input.

    Args:
        linear: the layer it takes the place of, whose parameters it takes over.
        adapter_name: the adapter that the copy belongs to.
        config: its configuration.
        key: qualified name of the layer in the base model.
        wrapper: PEFT's, which holds the copy and knows whether it is in use.

    Raises:
        ValueError: groups do not divide the rows of the weight, or a hardened configuration does not know this layer.
    """

    def __init__(
        self,
        linear: nn.Linear,
        adapter_name: str,
        config: BayesianLoraConfig,
        key: str,
        wrapper: ModulesToSaveWrapper,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.adapter_name = adapter_name
        self.phase: dict[str, GatePhase] = {adapter_name: GatePhase()}
        # In a plain list, so that it is no child, and copies and pickles of the whole model keep it among themselves.
        self.wrappers = [wrapper]
        shape = (self.out_features, self.in_features)
        if config.hardened:
            self.head_quantizers = fixed_quantizers(config, key, shape)
        else:
            quantizers = {site.value: learning_quantizer(site, config, shape, key) for site in HEAD_SITES}
            self.head_quantizers = nn.ModuleDict(quantizers)
        self.head_gates: LayerGates | None = None
        if config.learns:
            self.head_gates = LayerGates(
                len(HEAD_SITES),
                None,
                RankGate(config.rank_gate),
                initial_bit_logit=config.initial_bit_logit,
                initial_rank_logit=config.initial_rank_logit,
                sampled_share=config.sampled_share,
            )
        for part in (self.head_quantizers, self.head_gates):
            if part is not None and not self.weight.is_meta:
                part.to(self.weight.device).requires_grad_(self.weight.requires_grad)
        self.train(linear.training)

    @property
    def active_adapters(self) -> list[str]:
        """The adapter of this copy if it is the one in use, as a list; none otherwise."""
        return [self.adapter_name] if self.adapter_name in self.wrappers[0].active_adapters else []

    @property
    def disable_adapters(self) -> bool:
        """Whether the original head runs instead of any copy."""
        return bool(self.wrappers[0].disable_adapters)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype that `F.linear` gives."""
        gates = self.head_gates
        widths = None if gates is None else gates.values(hard=self._is_hard()).widths
        x = self._on_grid(Site.INPUT, x, widths)
        return F.linear(x, self._on_grid(Site.WEIGHT, self.weight, widths), self.bias)

    def _is_hard(self) -> bool:
        return not self.training or self.phase[self.adapter_name].fixed

    def _on_grid(self, site: Site, x: Tensor, widths: Tensor | None) -> Tensor:
        quantizer = self.quantizers_of(self.adapter_name)[site.value]
        if isinstance(quantizer, FixedQuantizer) or widths is None or self.head_gates is None:
            return quantizer(x)  # type: ignore[no-any-return]
        return self.head_gates.put_on_grid(quantizer, x, widths[HEAD_SITES.index(site)], hard=self._is_hard())

    def quantizers_of(self, adapter_name: str) -> dict[str, Quantizer | FixedQuantizer]:
        """The quantizers by the name of their site; none for another adapter."""
        if adapter_name != self.adapter_name:
            return {}
        return dict(self.head_quantizers.items())  # type: ignore[arg-type]

    def gates_of(self, adapter_name: str) -> LayerGates | None:
        """The gates, or None once they are hardened, or for another adapter."""
        return self.head_gates if adapter_name == self.adapter_name else None

    def rows_of(self, adapter_name: str) -> list[Site]:
        """The sites that the rows of the width gates stand for."""
        return list(HEAD_SITES) if adapter_name == self.adapter_name else []

    def effective_sites(self, adapter_name: str) -> list[Site]:
        """All sites that act on this layer, in the order of `Site`."""
        return self.rows_of(adapter_name)

    def quantizer_of(self, adapter_name: str, site: Site) -> Quantizer | FixedQuantizer | None:
        """The quantizer of a site; None if there is none."""
        return self.quantizers_of(adapter_name).get(site.value)

    def gate_of(self, adapter_name: str, site: Site) -> tuple[LayerGates, int] | None:
        """The gates, and the row of them, that decide a site's width; None if nothing is learned."""
        gates, rows = self.gates_of(adapter_name), self.rows_of(adapter_name)
        return (gates, rows.index(site)) if gates is not None and site in rows else None

    def device_of(self, adapter_name: str) -> torch.device:
        """Where the gates are."""
        return self.weight.device

    def macs_per_row(self, adapter_name: str) -> list[int]:
        """Multiply-accumulates per row that read the weight and the input: d1 d2 each."""
        return [self.in_features * self.out_features] * len(self.rows_of(adapter_name))

    def stored_numbers(self, adapter_name: str) -> list[int]:
        """Numbers that are stored at the width of each row of the gates: activations are not stored."""
        weight = self.in_features * self.out_features
        return [weight if site is Site.WEIGHT else 0 for site in self.rows_of(adapter_name)]

    def set_phase(self, adapter_name: str, phase: GatePhase, completed_steps: int) -> None:
        """Enter a phase of the schedule; a fixed phase freezes the gates.

        It also fits the range of the weight to the width that is now known. The weight is still trained then, and the
        range with it. While gates stand, no range is trained.
        """
        begins = phase.fixed and not self.phase[adapter_name].fixed
        self.phase[adapter_name] = phase
        if begins:
            self.fit_weight_range(adapter_name)
        self.apply_phase()

    def apply_phase(self) -> None:
        """Let gates and ranges learn as the phase has it, which PEFT does not know when it activates a copy."""
        gates = self.head_gates
        if gates is None or not self.active_adapters or self.disable_adapters:
            return
        phase = self.phase[self.adapter_name]
        gates.requires_grad_(not phase.fixed)
        gates.stand(stands=phase.stands, measures=phase.measures)
        for quantizer in self.quantizers_of(self.adapter_name).values():
            if isinstance(quantizer, Quantizer):
                quantizer.let_learn(not phase.stands)

    def forget_rounding(self, adapter_name: str) -> None:
        """Fit ranges anew when widths are known."""
        for quantizer in self.quantizers_of(adapter_name).values():
            if isinstance(quantizer, Quantizer):
                quantizer.forget_fit()

    def fit_weight_range(self, adapter_name: str) -> None:
        """Fit the range of the weight to the width it has now; once."""
        quantizer, decided = self.quantizer_of(adapter_name, Site.WEIGHT), self.gate_of(adapter_name, Site.WEIGHT)
        if isinstance(quantizer, Quantizer) and decided is not None and not self.weight.is_meta:
            gates, row = decided
            quantizer.fit(self.weight, int(bits_of_gates(gates.widths_of(row, hard=True))))

    def errors_of_fit(self, adapter_name: str, widths: Sequence[int]) -> Tensor:
        """[widths, 2] squared errors of the weight: with its present range, and once it is fitted; on the host."""
        quantizer = self.quantizer_of(adapter_name, Site.WEIGHT)
        if not isinstance(quantizer, Quantizer) or self.weight.is_meta:
            return torch.zeros(len(widths), 2)
        return torch.stack([quantizer.errors_of_fit(self.weight, bits) for bits in widths]).cpu()

    def cover_weights(self, adapter_name: str) -> None:
        """Widen the range of the weight while it still grows from its start."""
        quantizer = self.quantizer_of(adapter_name, Site.WEIGHT)
        if isinstance(quantizer, Quantizer):
            quantizer.cover(self.weight)

    def sites_without_values(self, adapter_name: str) -> list[str]:
        """Quantizers with nothing to make a range of: no value recorded, and no weight other than zero."""
        quantizers = self.quantizers_of(adapter_name).items()
        unseen = [site for site, q in quantizers if isinstance(q, Quantizer) and not q.has_seen_values]
        return [site for site in unseen if site != Site.WEIGHT.value or not bool(self.weight.any())]

    def finish_calibration(self, adapter_name: str) -> None:
        """End calibration of the quantizers that have seen anything but zeros."""
        for site, quantizer in self.quantizers_of(adapter_name).items():
            if isinstance(quantizer, Quantizer):
                if site == Site.WEIGHT.value and not quantizer.has_seen_values:
                    quantizer.record(self.weight)
                quantizer.finish_calibration()

    def replace_quantizers(self, quantizers: dict[str, FixedQuantizer]) -> None:
        """Take quantizers whose widths and ranges are decided, and drop the gates."""
        self.head_quantizers, self.head_gates = nn.ModuleDict(quantizers), None

    @torch.no_grad()
    def plain(self, *, rounded: bool) -> nn.Linear:
        """A layer without quantizers, with the weight as it is trained or as the gates of inference round it."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        if rounded:
            layer.weight = nn.Parameter(self._rounded_weight(), requires_grad=self.weight.requires_grad)
        return layer.train(self.training)

    def _rounded_weight(self) -> Tensor:
        quantizer = self.quantizers_of(self.adapter_name)[Site.WEIGHT.value]
        if isinstance(quantizer, FixedQuantizer) or self.head_gates is None:
            return quantizer(self.weight).clone()  # type: ignore[no-any-return]
        widths = self.head_gates.values(hard=True).widths
        return quantizer.rounded(self.weight, widths[HEAD_SITES.index(Site.WEIGHT)]).clone()


def quantized_heads(model: nn.Module) -> Iterator[tuple[str, QuantizedHeadLinear]]:
    """All quantized linear layers of trained heads with their qualified names, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedHeadLinear):
            yield name, module


def base_key(name: str, adapter_name: str) -> str:
    """The name that a layer in the trained copy of an adapter has in the base model."""
    return name.replace(f".modules_to_save.{adapter_name}", "")


def name_late_heads(config: BayesianLoraConfig) -> None:
    """Add to `modules_to_save` the heads that PEFT would add once the adapters are in place."""
    task = getattr(config.task_type, "value", config.task_type)
    names = LATE_HEADS.get(task or "", ())
    if names:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *names]))


def check_heads(model: nn.Module, config: BayesianLoraConfig) -> None:
    """Raise ValueError if no head is trained in full, or one of its linear layers cannot be quantized.

    Args:
        model: the model, without this adapter so far.
        config: the configuration of the adapter.
    """
    found = list(_trained_linears(model, config.modules_to_save or ()))
    if not found:
        raise ValueError(
            f"`quantize_head`=True, but no linear layer of {type(model).__name__} is trained in full: `modules_to_save`"
            f"={config.modules_to_save}; expected it to name the head, such as ['classifier'], or quantize_head=False"
        )
    for key, linear in found:
        try:
            config.range_layout.range_shape((linear.out_features, linear.in_features))
        except ValueError as reason:
            raise ValueError(f"`quantize_head`=True: {key!r}: {reason}; {without_groups(config)}") from reason
        if config.hardened and key not in (config.hardened_bits or {}):
            raise ValueError(
                f"this adapter was hardened for the layers {sorted(config.hardened_bits or {})}, not for the head "
                f"{key!r}: load it onto the base model it was trained on"
            )


def _trained_linears(model: nn.Module, names: tuple[str, ...] | list[str]) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of all modules whose names end as PEFT looks for them, under their names in the base model."""
    seen: set[int] = set()
    for key, module in model.named_modules():
        if ".modules_to_save." in key or ".original_module" in key or not key.endswith(tuple(names)):
            continue
        part = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        for inner, linear in part.named_modules():
            if type(linear) is nn.Linear and id(linear) not in seen:
                seen.add(id(linear))
                yield f"{key}.{inner}".rstrip("."), linear


def install(model: nn.Module, adapter_name: str, config: BayesianLoraConfig) -> None:
    """Give quantizers to the linear layers of an adapter's trained copies.

    Args:
        model: the model that the tuner works on, with PEFT's wrappers in place.
        adapter_name: the adapter.
        config: its configuration, checked by `check_heads`.
    """
    wrappers = [(name, m) for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    for name, wrapper in wrappers:
        if adapter_name not in wrapper.modules_to_save:
            continue
        copy = wrapper.modules_to_save[adapter_name]
        for inner, linear in [(n, m) for n, m in copy.named_modules() if type(m) is nn.Linear]:
            key = f"{name}.{inner}".rstrip(".")
            quantized = QuantizedHeadLinear(linear, adapter_name, config, key, wrapper)
            if inner:
                copy.set_submodule(inner, quantized)
            else:
                wrapper.modules_to_save[adapter_name] = quantized


def apply_phases(model: nn.Module) -> None:
    """Let gates and ranges of heads learn as their phase has it, after PEFT has switched copies on."""
    for _, head in quantized_heads(model):
        head.apply_phase()


def replace_by_plain(model: nn.Module, *, rounded: bool) -> None:
    """Put layers without quantizers in the place of all quantized heads."""
    for name, head in list(quantized_heads(model)):
        model.set_submodule(name, cast(nn.Module, head.plain(rounded=rounded)))
