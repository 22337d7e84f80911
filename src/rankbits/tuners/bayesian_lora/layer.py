"""A linear layer with Bayesian-LoRA adapters: the one place where gates meet quantizers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from rankbits.errors import MergeError, RankbitsWarning
from rankbits.quant.grid import Signedness
from rankbits.quant.quantizer import FixedQuantizer, Quantizer
from rankbits.tuners.bayesian_lora.config import BayesianLoraConfig, RankGate, Site, Start, start_of
from rankbits.tuners.bayesian_lora.layer_gates import GateValues, LayerGates
from rankbits.tuners.linear import AdapterLinear

DIAGONAL_HEADROOM = 1.5
"""With this range over max|E| a constant E lies on the grid at every width, where a range at max|E| would not."""
WEIGHT_STANDARD_DEVIATION = 0.02
UNSCHEDULED_PASSES = 100
"""Training passes without a step of the schedule after which a layer says so."""
ACTIVATION_SITES = (Site.INPUT, Site.DOWN_OUTPUT, Site.DIAGONAL_OUTPUT, Site.OUTPUT)
"""Quantizers whose work no single weight can do."""


@dataclass(frozen=True)
class GatePhase:
    """What the schedule asks of one adapter at this moment of training.

    Args:
        lambda_q: weight of the penalty on bits.
        lambda_r: weight of the penalty on ranks.
        fixed: gates are thresholded and no longer trained.
        largest_macs: if given, widths are penalised by bit operations, relative to the tensor with this many
            multiply-accumulates per row; else all alike.
    """

    lambda_q: float = 0.0
    lambda_r: float = 0.0
    fixed: bool = False
    largest_macs: int | None = None


class BayesianLoraLinear(AdapterLinear):
    """y = Q_out(Q_in(x) Q_w(W0)^T + bias + s Q_E(Q_A(x A^T) E g) B^T), Bayesian-LoRA Eqs. 8-15 and Alg. 1."""

    adapter_layer_names = (
        "bayesian_lora_down",
        "bayesian_lora_diagonal",
        "bayesian_lora_up",
        "bayesian_lora_gates",
        "bayesian_lora_quantizers",
    )
    other_param_names = ("bayesian_lora_dropout", "bayesian_lora_steps", "r", "scaling", "phase", "unscheduled_passes")

    bayesian_lora_down: nn.ParameterDict
    bayesian_lora_diagonal: nn.ParameterDict
    bayesian_lora_up: nn.ParameterDict
    bayesian_lora_gates: nn.ModuleDict
    bayesian_lora_quantizers: nn.ModuleDict
    bayesian_lora_dropout: nn.ModuleDict
    bayesian_lora_steps: BufferDict

    def create_containers(self) -> None:
        """Create the empty per-adapter containers."""
        self.bayesian_lora_down = nn.ParameterDict()
        self.bayesian_lora_diagonal = nn.ParameterDict()
        self.bayesian_lora_up = nn.ParameterDict()
        self.bayesian_lora_gates = nn.ModuleDict()
        self.bayesian_lora_quantizers = nn.ModuleDict()
        self.bayesian_lora_dropout = nn.ModuleDict()
        self.bayesian_lora_steps = BufferDict(persistent=True)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.phase: dict[str, GatePhase] = {}
        self.unscheduled_passes: dict[str, int] = {}

    def update_layer(self, adapter_name: str, config: BayesianLoraConfig, key: str) -> None:
        """Add one adapter.

        Args:
            adapter_name: its name.
            config: its configuration.
            key: qualified name of this layer in the base model.

        Raises:
            ValueError: r exceeds what the matrix can have, or a hardened configuration does not know this layer.
        """
        rank = self._rank(config, key)
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.alpha / config.r
        self.phase[adapter_name] = GatePhase()
        self.unscheduled_passes[adapter_name] = 0
        self.bayesian_lora_down[adapter_name] = nn.Parameter(torch.empty(rank, self.in_features))
        self.bayesian_lora_diagonal[adapter_name] = nn.Parameter(torch.empty(rank))
        self.bayesian_lora_up[adapter_name] = nn.Parameter(torch.empty(self.out_features, rank))
        self.bayesian_lora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.bayesian_lora_steps[adapter_name] = torch.zeros((), dtype=torch.int64)
        self._reset(adapter_name, start_of(config.init_weights))
        if config.hardened:
            self.bayesian_lora_quantizers[adapter_name] = _fixed_quantizers(config, key)
        else:
            self._add_gates(adapter_name, config, rank)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _rank(self, config: BayesianLoraConfig, key: str) -> int:
        if config.hardened_ranks is not None:
            if key not in config.hardened_ranks:
                raise ValueError(
                    f"this adapter was hardened for the layers {sorted(config.hardened_ranks)}, not for {key!r}: "
                    "load it onto the base model it was trained on"
                )
            return config.hardened_ranks[key]
        limit = min(self.in_features, self.out_features)
        if config.r > limit:
            raise ValueError(
                f"`r`={config.r} exceeds the rank that {key!r} can have: its weight is "
                f"[{self.out_features}, {self.in_features}], so r <= {limit}"
            )
        return config.r

    def _reset(self, adapter_name: str, start: Start) -> None:
        down, up = self.bayesian_lora_down[adapter_name], self.bayesian_lora_up[adapter_name]
        if start is Start.ADALORA:
            nn.init.normal_(down, std=WEIGHT_STANDARD_DEVIATION)
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        if start is Start.LORA:
            nn.init.zeros_(up)
        else:
            nn.init.normal_(up, std=WEIGHT_STANDARD_DEVIATION)
        nn.init.constant_(self.bayesian_lora_diagonal[adapter_name], 0.0 if start is Start.ADALORA else 1.0)

    def _add_gates(self, adapter_name: str, config: BayesianLoraConfig, rank: int) -> None:
        # A base that is quantized already keeps its own grid.
        sites = [s for s in config.sites if not (s is Site.WEIGHT and self.quantization_backend is not None)]
        quantizers = {site: _new_quantizer(site, config) for site in sites}
        if Site.WEIGHT in quantizers:
            quantizers[Site.WEIGHT].calibrate_to(self.get_base_weight())
        self.bayesian_lora_quantizers[adapter_name] = nn.ModuleDict({s.value: q for s, q in quantizers.items()})
        if config.learns:
            self.bayesian_lora_gates[adapter_name] = LayerGates(
                len(sites),
                rank if config.learn_rank and rank > 1 else None,
                RankGate(config.rank_gate),
                initial_bit_logit=config.initial_bit_logit,
                initial_rank_logit=config.initial_rank_logit,
            )

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters.

        Raises:
            ValueError: several adapters of which one has quantizers; two would quantize the same weight twice.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        present = [name for name in names if name in self.bayesian_lora_down]
        quantizing = [name for name in present if self.quantizers_of(name)]
        if quantizing and len(present) > 1:
            raise ValueError(
                f"adapters {present} were to be active together, but {quantizing} quantize the layer: at most one "
                "Bayesian-LoRA adapter with quantizers can be active (learn_bits=False adapters can be combined)"
            )
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def quantizers_of(self, adapter_name: str) -> dict[str, Quantizer | FixedQuantizer]:
        """The quantizers of an adapter by the name of their site, in the order of the rows of its width gates."""
        if adapter_name not in self.bayesian_lora_quantizers:
            return {}
        return dict(cast(nn.ModuleDict, self.bayesian_lora_quantizers[adapter_name]).items())  # type: ignore[arg-type]

    def gates_of(self, adapter_name: str) -> LayerGates | None:
        """The gates of an adapter, or None if it has none (plain, or hardened)."""
        if adapter_name not in self.bayesian_lora_gates:
            return None
        return cast(LayerGates, self.bayesian_lora_gates[adapter_name])

    def sites_of(self, adapter_name: str) -> list[Site]:
        """The quantizers of an adapter, in the order of the rows of its width gates."""
        return [Site(name) for name in self.quantizers_of(adapter_name)]

    def _gate_values(self, adapter_name: str) -> GateValues | None:
        gates = self.gates_of(adapter_name)
        return gates.values(hard=not self.training or self.phase[adapter_name].fixed) if gates is not None else None

    def _quantize(
        self, adapter_name: str, site: Site, x: Tensor, gates: GateValues | None, *, record: bool = True
    ) -> Tensor:
        quantizers = self.quantizers_of(adapter_name)
        if site.value not in quantizers:
            return x
        quantizer = quantizers[site.value]
        if isinstance(quantizer, FixedQuantizer) or gates is None:
            return quantizer(x)  # type: ignore[no-any-return]
        widths = gates.widths[list(quantizers).index(site.value)]
        return quantizer(x, widths, hard=gates.hard) if record else quantizer.rounded(x, widths)

    def adapted_forward(self, x: Tensor) -> Tensor:
        """Output with the active adapters: [..., in_features] to [..., out_features]."""
        active = [name for name in self.active_adapters if name in self.bayesian_lora_down]
        if not any(self.quantizers_of(name) for name in active):
            result = self._base_output(x)
            for name in active:
                result = result + self._update(name, x, self._pass_gates(name)).to(result.dtype)
            return result
        (name,) = active
        gates = self._pass_gates(name)
        x = self._quantize(name, Site.INPUT, x, gates)
        result = self._base_product(name, x, gates)
        result = result + self._update(name, x, gates).to(result.dtype)
        return self._quantize(name, Site.OUTPUT, result, gates)

    def _pass_gates(self, adapter_name: str) -> GateValues | None:
        gates = self._gate_values(adapter_name)
        if gates is not None and self.training and self.unscheduled_passes[adapter_name] >= 0:
            self._count_unscheduled(adapter_name)
        return gates

    def _count_unscheduled(self, adapter_name: str) -> None:
        self.unscheduled_passes[adapter_name] += 1
        if self.unscheduled_passes[adapter_name] == UNSCHEDULED_PASSES:
            warnings.warn(
                f"{UNSCHEDULED_PASSES} training passes without a step of the gate schedule: nothing will be learned "
                "about ranks and bits. Add RankbitsCallback() to the Trainer's callbacks, or call "
                "GateSchedule(model, total_steps).step() after each optimizer step",
                RankbitsWarning,
                stacklevel=2,
            )

    def _base_output(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        backend = self.quantization_backend
        return result if backend is None else backend.maybe_clone_base_result(result)

    def _base_product(self, adapter_name: str, x: Tensor, gates: GateValues | None) -> Tensor:
        """Base layer with its quantized weight: [..., in_features] to [..., out_features]."""
        if Site.WEIGHT.value not in self.quantizers_of(adapter_name):
            return self._base_output(x)
        weight = self._quantize(adapter_name, Site.WEIGHT, self.oriented(self.weight), gates)
        return F.linear(self._cast_input_dtype(x, weight.dtype), weight, self.bias)

    def _update(self, adapter_name: str, x: Tensor, gates: GateValues | None) -> Tensor:
        """The scaled low-rank update: [..., in_features] to [..., out_features]."""
        down = self._quantize(adapter_name, Site.DOWN, self.bayesian_lora_down[adapter_name], gates)
        diagonal = self._quantize(adapter_name, Site.DIAGONAL, self.bayesian_lora_diagonal[adapter_name], gates)
        up = self._quantize(adapter_name, Site.UP, self.bayesian_lora_up[adapter_name], gates)
        if gates is not None and gates.ranks is not None:
            diagonal = diagonal * gates.ranks.to(diagonal.dtype)
        x = self.bayesian_lora_dropout[adapter_name](self._cast_input_dtype(x, down.dtype))
        hidden = self._quantize(adapter_name, Site.DOWN_OUTPUT, F.linear(x, down), gates)  # [..., r]
        hidden = hidden * diagonal.to(hidden.dtype)
        hidden = self._quantize(adapter_name, Site.DIAGONAL_OUTPUT, hidden, gates)
        return F.linear(hidden, up) * self.scaling[adapter_name]  # [..., out_features]

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raise MergeError where no single weight computes what the layer computes (quantized activations)."""
        for name in adapter_names:
            blocking = [site.value for site in self.sites_of(name) if site in ACTIVATION_SITES]
            if blocking:
                raise MergeError(
                    f"adapter {name!r} cannot be merged exactly: it quantizes the activations {blocking}, which no "
                    "weight can do. Adapters trained with learn_bits=False, or with "
                    "quantizers=['weight', 'down', 'diagonal', 'up'], can be merged; this one runs unmerged"
                )
        together = {*adapter_names, *self.merged_adapters}
        for name in sorted(together):
            if self.sites_of(name) and len(together) > 1:
                raise MergeError(
                    f"adapter {name!r} quantizes the base weight, so it can only be merged alone, not with "
                    f"{sorted(together - {name})}"
                )

    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        """Q_w(W0) + s Q_b(B) diag(Q_e(E) g) Q_a(A), with the gates of inference whatever the mode.

        Args:
            adapter_name: which adapter.
            weight: [out_features, in_features], float32.
        """
        gates = self.gates_of(adapter_name)
        values = gates.values(hard=True) if gates is not None else None

        def rounded(site: Site, tensor: Tensor) -> Tensor:
            return self._quantize(adapter_name, site, tensor.to(torch.float32), values, record=False)

        down = rounded(Site.DOWN, self.bayesian_lora_down[adapter_name])
        diagonal = rounded(Site.DIAGONAL, self.bayesian_lora_diagonal[adapter_name])
        up = rounded(Site.UP, self.bayesian_lora_up[adapter_name])
        if values is not None and values.ranks is not None:
            diagonal = diagonal * values.ranks
        update = (up * diagonal) @ down * self.scaling[adapter_name]  # [out_features, in_features]
        return rounded(Site.WEIGHT, weight) + update

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True where the update is all the adapter does: without quantizers."""
        return not self.sites_of(adapter_name)

    def set_phase(self, adapter_name: str, phase: GatePhase, completed_steps: int) -> None:
        """Enter a phase of the schedule; a fixed phase freezes the gates, whatever later activates the adapter."""
        self.phase[adapter_name] = phase
        if completed_steps > 0:
            self.unscheduled_passes[adapter_name] = -1
        self.bayesian_lora_steps[adapter_name].fill_(completed_steps)
        gates = self.gates_of(adapter_name)
        if phase.fixed:
            self.frozen_peft_weight_names[adapter_name] = ("bayesian_lora_gates",)
        else:
            self.frozen_peft_weight_names.pop(adapter_name, None)
        if gates is not None and adapter_name in self.active_adapters and not self.disable_adapters:
            gates.requires_grad_(not phase.fixed)

    def sites_without_values(self, adapter_name: str) -> list[str]:
        """Quantizers with nothing to make a range of: no value recorded, and no weight other than zero."""
        visible = {id(q) for q, weight in self._weight_quantizers(adapter_name) if bool(weight.any())}
        quantizers = self.quantizers_of(adapter_name).items()
        unseen = [(s, q) for s, q in quantizers if isinstance(q, Quantizer) and not q.has_seen_values]
        return [site for site, quantizer in unseen if id(quantizer) not in visible]

    def finish_calibration(self, adapter_name: str) -> None:
        """End calibration of all quantizers of an adapter that have seen anything but zeros."""
        for weight_quantizer, weight in self._weight_quantizers(adapter_name):
            if not weight_quantizer.has_seen_values:
                weight_quantizer.record(weight)
        for quantizer in self.quantizers_of(adapter_name).values():
            if isinstance(quantizer, Quantizer):
                quantizer.finish_calibration()

    def cover_weights(self, adapter_name: str) -> None:
        """Widen the ranges of A, E and B to their weights, while these still grow from their start."""
        for quantizer, weight in self._weight_quantizers(adapter_name):
            quantizer.cover(weight)

    def _weight_quantizers(self, adapter_name: str) -> Iterator[tuple[Quantizer, Tensor]]:
        for site, weights in (
            (Site.DOWN, self.bayesian_lora_down),
            (Site.DIAGONAL, self.bayesian_lora_diagonal),
            (Site.UP, self.bayesian_lora_up),
        ):
            quantizer = self.quantizers_of(adapter_name).get(site.value)
            if isinstance(quantizer, Quantizer):
                yield quantizer, weights[adapter_name]

    def macs_per_row(self, adapter_name: str) -> list[int]:
        """Multiply-accumulates per row that read each quantized tensor, in the order of `sites_of`.

        They weight the penalty on bits (van Baalen et al. 2020). The readers of the output are other layers, which
        this one does not know: 0.
        """
        inputs, outputs, rank = self.in_features, self.out_features, self.r[adapter_name]
        macs = {
            Site.WEIGHT: inputs * outputs,
            Site.DOWN: rank * inputs,
            Site.DIAGONAL: rank,
            Site.UP: outputs * rank,
            Site.DOWN_OUTPUT: rank,
            Site.DIAGONAL_OUTPUT: outputs * rank,
            Site.OUTPUT: 0,
            Site.INPUT: inputs * outputs + rank * inputs,
        }
        return [macs[site] for site in self.sites_of(adapter_name)]

    def __repr__(self) -> str:
        return "bayesian_lora." + super().__repr__()


def _new_quantizer(site: Site, config: BayesianLoraConfig) -> Quantizer:
    return Quantizer(
        calibration_passes=config.calibration_passes,
        signedness=Signedness.AUTO if site is Site.INPUT else Signedness.SIGNED,
        headroom=DIAGONAL_HEADROOM if site is Site.DIAGONAL else 1.0,
    )


def _fixed_quantizers(config: BayesianLoraConfig, key: str) -> nn.ModuleDict:
    bits = (config.hardened_bits or {}).get(key, {})
    unsigned = key in (config.unsigned_inputs or ())
    return nn.ModuleDict(
        {
            site: FixedQuantizer(width, signed=not (unsigned and site == Site.INPUT.value))
            for site, width in bits.items()
        }
    )
