"""What the adapters of a linear layer consist of: weights, gates, quantizers, and which layer decides about each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import cast

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from rankbits.quant.fixed_quantizer import FixedQuantizer
from rankbits.quant.quantizer import Quantizer
from rankbits.tuners.bayesian_lora.config import BayesianLoraConfig, Operand, Placement, RankGate, Site, start_of
from rankbits.tuners.bayesian_lora.layer_gates import LayerGates
from rankbits.tuners.bayesian_lora.reuse import Rounded, SharedResult
from rankbits.tuners.bayesian_lora.start import (
    check_quantizable,
    fixed_quantizers,
    learning_quantizer,
    rank_of,
    start_weights,
)
from rankbits.tuners.linear import AdapterLinear


@dataclass(frozen=True)
class GatePhase:
    """What the schedule asks of one adapter at this moment of training.

    Args:
        lambda_q: weight of the penalty on bits.
        lambda_r: weight of the penalty on ranks.
        fixed: gates are thresholded and no longer trained.
        largest_macs: if given, widths are penalised by bit operations, relative to the tensor with this many
            multiply-accumulates per row; else all alike.
        largest_stored: if given, widths are penalised by stored bytes, relative to the tensor with this many numbers.
        pressure: weights of the probability of each width gate [sites, 4] and rank gate [r - 1] of the layer in the
            penalty; None while no budget presses.
        stands: gates are those of inference though they are not fixed yet, and ranges follow the largest magnitude:
            noise serves nothing while no gate can close.
        measures: what closing each gate would cost is measured meanwhile.
        completed: training is over.
    """

    lambda_q: float = 0.0
    lambda_r: float = 0.0
    fixed: bool = False
    largest_macs: int | None = None
    largest_stored: int | None = None
    pressure: tuple[Tensor, Tensor] | None = field(default=None, compare=False)
    stands: bool = False
    measures: bool = False
    completed: bool = False


class GatedAdapters(AdapterLinear, ABC):
    """The state of a Bayesian-LoRA layer, and its phases.

    Layers that read the same tensor may share one input quantizer, and one weight width: the first of them owns it, the
    others hold that layer.
    """

    adapter_layer_names = (
        "bayesian_lora_down",
        "bayesian_lora_diagonal",
        "bayesian_lora_up",
        "bayesian_lora_gates",
        "bayesian_lora_quantizers",
    )
    other_param_names = (
        "bayesian_lora_dropout",
        "bayesian_lora_steps",
        "r",
        "scaling",
        "placement",
        "weight_gradient_rows",
        "phase",
        "unscheduled_passes",
        "learns_unrounded",
        "awaits_codes",
        "learns_weight_ranges",
        "owners",
        "readers",
        "shared_inputs",
        "rounded_weights",
        "operands",
    )

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
        self.placement: dict[str, Placement] = {}
        self.weight_gradient_rows: dict[str, int | None] = {}
        self.phase: dict[str, GatePhase] = {}
        self.unscheduled_passes: dict[str, int] = {}
        self.learns_unrounded: dict[str, bool] = {}
        self.awaits_codes: dict[str, bool] = {}
        self.learns_weight_ranges: dict[str, bool] = {}
        # Held in plain dictionaries, so that copies and pickles of the whole model keep them among themselves.
        self.owners: dict[str, dict[Site, GatedAdapters]] = {}
        self.readers: dict[str, dict[Site, list[GatedAdapters]]] = {}
        self.shared_inputs: dict[str, SharedResult] = {}
        self.rounded_weights: dict[str, Rounded] = {}
        self.operands: dict[str, Operand | None] = {}
        self.attention_before: str | None = None

    def update_layer(self, adapter_name: str, config: BayesianLoraConfig, key: str) -> None:
        """Add one adapter.

        Args:
            adapter_name: its name.
            config: its configuration.
            key: qualified name of this layer in the base model.

        Raises:
            ValueError: r exceeds what the matrix can have, a hardened configuration does not know this layer, groups do
                not divide its rows, its weight is not finite, or a merged placement on a base that is quantized
                already.
            TypeError: the weight is to be quantized, and the layer may be more than a product with it.
        """
        shape = (self.out_features, self.in_features)
        rank = rank_of(config, key, shape)
        placement = Placement(config.placement)
        if placement is Placement.MERGED and self.quantization_backend is not None:
            raise ValueError(
                f"{key!r}: placement='merged' quantizes the sum of weight and update, but this base is quantized "
                "already and keeps its own grid: use placement='separate'"
            )
        # First of all, because groups may not fit; nothing has been added then.
        if config.hardened:
            quantizers = fixed_quantizers(config, key, shape, compensated=config.compensates)
        else:
            quantizers = self._learning(config, key)
        if Site.WEIGHT.value in quantizers:
            weight = self.oriented(self.get_base_weight())
            check_quantizable(self.get_base_layer(), weight, key)
            of_weight = quantizers[Site.WEIGHT.value]
            if isinstance(of_weight, Quantizer):
                of_weight.calibrate_to(weight)
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.alpha / config.r
        self.placement[adapter_name] = placement
        self.weight_gradient_rows[adapter_name] = config.weight_gradient_rows
        self.phase[adapter_name] = GatePhase()
        self.unscheduled_passes[adapter_name] = 0
        self.learns_unrounded[adapter_name] = self.awaits_codes[adapter_name] = False
        self.learns_weight_ranges[adapter_name] = not config.hardened
        self.operands[adapter_name] = config.operand
        self.owners[adapter_name], self.readers[adapter_name] = {}, {}
        self.shared_inputs[adapter_name], self.rounded_weights[adapter_name] = SharedResult(), Rounded()
        self.bayesian_lora_down[adapter_name] = nn.Parameter(torch.empty(rank, self.in_features))
        self.bayesian_lora_diagonal[adapter_name] = nn.Parameter(torch.empty(rank))
        self.bayesian_lora_up[adapter_name] = nn.Parameter(torch.empty(self.out_features, rank))
        self.bayesian_lora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.bayesian_lora_steps[adapter_name] = torch.zeros((), dtype=torch.int64)
        start_weights(*self._factors(adapter_name), start_of(config.init_weights))
        self.bayesian_lora_quantizers[adapter_name] = quantizers
        if config.learns:
            self.bayesian_lora_gates[adapter_name] = LayerGates(
                len(quantizers),
                rank if config.learn_rank and rank > 1 else None,
                RankGate(config.rank_gate),
                initial_bit_logit=config.initial_bit_logit,
                initial_rank_logit=config.initial_rank_logit,
                sampled_share=config.sampled_share,
            )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _learning(self, config: BayesianLoraConfig, key: str) -> nn.ModuleDict:
        # A base that is quantized already keeps its own grid.
        sites = [s for s in config.sites if not (s is Site.WEIGHT and self.quantization_backend is not None)]
        shape = (self.out_features, self.in_features)
        return nn.ModuleDict(
            {s.value: learning_quantizer(s, config, shape, key, compensated=config.compensates) for s in sites}
        )

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A, E and B."""
        return (
            self.bayesian_lora_down[adapter_name],
            self.bayesian_lora_diagonal[adapter_name],
            self.bayesian_lora_up[adapter_name],
        )

    def follow(self, adapter_name: str, owner: GatedAdapters, site: Site) -> None:
        """Leave a site to another layer: the quantizer of an input that both read, or the width of both weights."""
        own = self.rows_of(adapter_name)
        gates = self.gates_of(adapter_name)
        if site in own and gates is not None:
            gates.without_row(own.index(site))
        if site is Site.INPUT and site.value in self.quantizers_of(adapter_name):
            del cast(nn.ModuleDict, self.bayesian_lora_quantizers[adapter_name])[site.value]
        self.owners[adapter_name][site] = owner
        owner.readers[adapter_name].setdefault(site, [owner]).append(self)

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
        for name in present:
            quantizer = self.quantizers_of(name).get(Site.WEIGHT.value)
            if isinstance(quantizer, Quantizer) and not self.learns_weight_ranges[name] and not inference_mode:
                quantizer.let_learn(False)

    def quantizers_of(self, adapter_name: str) -> dict[str, Quantizer | FixedQuantizer]:
        """The quantizers that this layer owns, by the name of their site, in the order of `Site`."""
        if adapter_name not in self.bayesian_lora_quantizers:
            return {}
        return dict(cast(nn.ModuleDict, self.bayesian_lora_quantizers[adapter_name]).items())  # type: ignore[arg-type]

    def gates_of(self, adapter_name: str) -> LayerGates | None:
        """The gates that this layer owns, or None if it has none (plain, or hardened)."""
        if adapter_name not in self.bayesian_lora_gates:
            return None
        return cast(LayerGates, self.bayesian_lora_gates[adapter_name])

    def sites_of(self, adapter_name: str) -> list[Site]:
        """The sites whose quantizer this layer owns, in the order of `Site`."""
        return [Site(name) for name in self.quantizers_of(adapter_name)]

    def rows_of(self, adapter_name: str) -> list[Site]:
        """The sites that the rows of this layer's own width gates stand for."""
        return [site for site in self.sites_of(adapter_name) if site not in self.owners[adapter_name]]

    def effective_sites(self, adapter_name: str) -> list[Site]:
        """All sites that act on this layer, those of an owner included, in the order of `Site`."""
        if adapter_name not in self.owners:
            return []
        return [site for site in Site if self.quantizer_of(adapter_name, site) is not None]

    def quantizer_of(self, adapter_name: str, site: Site) -> Quantizer | FixedQuantizer | None:
        """The quantizer that acts on a site of this layer, whoever owns it; None if there is none."""
        owner = self.owners[adapter_name].get(site, self) if site is Site.INPUT else self
        return owner.quantizers_of(adapter_name).get(site.value)

    def gate_of(self, adapter_name: str, site: Site) -> tuple[LayerGates, int] | None:
        """The gates, and the row of them, that decide a site's width, whoever owns them; None if nothing is learned."""
        owner = self.owners[adapter_name].get(site, self)
        gates, rows = owner.gates_of(adapter_name), owner.rows_of(adapter_name)
        return (gates, rows.index(site)) if gates is not None and site in rows else None

    def attending_adapter(self) -> str | None:
        """The adapter whose quantizers act where an attention reads this layer's output; None if there is none."""
        if self.disable_adapters:
            return None
        names = self.merged_adapters if self.merged else self.active_adapters
        return next((name for name in names if self.operands.get(name) is not None), None)

    def device_of(self, adapter_name: str) -> torch.device:
        """Where an adapter is. Its layer may own no gates: all of them can be a sibling's."""
        device: torch.device = self.bayesian_lora_up[adapter_name].device
        return device

    def placement_of(self, adapter_name: str) -> Placement:
        """Whether the update lies beside the quantized weight or within it."""
        return self.placement[adapter_name]

    def set_phase(self, adapter_name: str, phase: GatePhase, completed_steps: int) -> None:
        """Enter a phase of the schedule; a fixed phase freezes the gates, whatever later activates the adapter.

        It also fits the ranges of the weight to the widths that are now known, and freezes them unless these are 2
        bits: where a range has three numbers, each counts. A weight that is rounded last learns unrounded from then on.
        While gates stand, no range is trained.
        """
        before = self.phase[adapter_name]
        self.phase[adapter_name] = phase
        if completed_steps > 0:
            self.unscheduled_passes[adapter_name] = -1
        self.bayesian_lora_steps[adapter_name].fill_(completed_steps)
        if phase.fixed and not before.fixed:
            self.fit_weight_range(adapter_name)
        if (phase.fixed, phase.completed) != (before.fixed, before.completed):
            learns = phase.fixed and not phase.completed
            self.learns_unrounded[adapter_name] = learns and self.is_rounded_last(adapter_name)
            self.learns_weight_ranges[adapter_name] = not phase.fixed or (learns and self.is_coarsest(adapter_name))
        if phase.fixed:
            self.frozen_peft_weight_names[adapter_name] = ("bayesian_lora_gates",)
        else:
            self.frozen_peft_weight_names.pop(adapter_name, None)
        gates = self.gates_of(adapter_name)
        if gates is not None and adapter_name in self.active_adapters and not self.disable_adapters:
            gates.requires_grad_(not phase.fixed)
            gates.stand(stands=phase.stands, measures=phase.measures)
            for site, quantizer in self.quantizers_of(adapter_name).items():
                # While gates stand ranges follow the largest magnitude: with all bits there is next to no gradient by a
                # range, and an optimizer that normalises it would let the range drift.
                learns = site != Site.WEIGHT.value or self.learns_weight_ranges[adapter_name]
                if isinstance(quantizer, Quantizer):
                    quantizer.let_learn(learns and not phase.stands)

    def macs_per_row(self, adapter_name: str) -> list[int]:
        """Multiply-accumulates per row that read each tensor whose width this layer decides, in the order of `rows_of`.

        They weight the penalty on bits (van Baalen et al. 2020); what is shared counts with all its readers. The
        readers of the output are other layers, which this one does not know: 0. Neither does it know how many keys an
        attention has, so that its operands and probabilities are 0, too; a budget with a length counts them.
        """
        shared = self.readers[adapter_name]
        return [
            sum(layer._macs(adapter_name)[s] for layer in shared.get(s, [self])) for s in self.rows_of(adapter_name)
        ]

    def stored_numbers(self, adapter_name: str) -> list[int]:
        """Numbers that are stored at each width the layer's own gates decide, in the order of `rows_of`.

        A width that several layers share counts the weights of all of them; activations are not stored.
        """
        rank, inputs, outputs = self.r[adapter_name], self.in_features, self.out_features
        readers = self.readers[adapter_name].get(Site.WEIGHT, [self])
        sizes = {Site.WEIGHT: sum(reader.in_features * reader.out_features for reader in readers)}
        if self.placement[adapter_name] is not Placement.MERGED:
            sizes |= {Site.DOWN: rank * inputs, Site.DIAGONAL: rank, Site.UP: outputs * rank}
        return [sizes.get(site, 0) for site in self.rows_of(adapter_name)]

    def _macs(self, adapter_name: str) -> dict[Site, int]:
        inputs, outputs, rank = self.in_features, self.out_features, self.r[adapter_name]
        beside = 0 if self.placement[adapter_name] is Placement.MERGED else rank
        return {
            Site.WEIGHT: inputs * outputs,
            Site.DOWN: rank * inputs,
            Site.DIAGONAL: rank,
            Site.UP: outputs * rank,
            Site.DOWN_OUTPUT: rank,
            Site.DIAGONAL_OUTPUT: outputs * rank,
            Site.OUTPUT: 0,
            Site.INPUT: inputs * outputs + beside * inputs,
            Site.PROBABILITIES: 0,
        }

    @abstractmethod
    def fit_weight_range(self, adapter_name: str) -> None:
        """Fit the ranges of what the weight's quantizer rounds to the width it has now."""

    @abstractmethod
    def forget_rounding(self, adapter_name: str) -> None:
        """Fit ranges, and choose the codes of the weight, anew when widths are known."""

    @abstractmethod
    def is_rounded_last(self, adapter_name: str) -> bool:
        """Whether the weight, at the width it has now, is to be rounded after the last step and not before."""

    @abstractmethod
    def is_coarsest(self, adapter_name: str) -> bool:
        """Whether the weight has learned the smallest width there is."""
