"""A linear layer with Bayesian-LoRA adapters: the one place where gates meet quantizers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankbits.errors import MergeError, RankbitsWarning
from rankbits.quant.fixed_quantizer import FixedQuantizer
from rankbits.quant.quantizer import Quantizer
from rankbits.tuners.bayesian_lora import products
from rankbits.tuners.bayesian_lora.config import ACTIVATION_SITES, Placement, Site
from rankbits.tuners.bayesian_lora.layer_gates import GateValues
from rankbits.tuners.bayesian_lora.rounded_weight import RoundedWeight

UNSCHEDULED_PASSES = 100
"""Training passes without a step of the schedule after which a layer says so."""


class BayesianLoraLinear(RoundedWeight):
    """y = Q_out(Q_in(x) Q_w(W0)^T + bias + s Q_E(Q_A(x A^T) E g) B^T), Bayesian-LoRA Eqs. 8-15 and Alg. 1.

    With the merged placement y = Q_out(Q_in(x) Q_w(W0 + s B diag(E g) A)^T + bias).
    """

    def _gate_values(self, adapter_name: str) -> GateValues | None:
        gates = self.gates_of(adapter_name)
        return gates.values(hard=not self.training or self.phase[adapter_name].fixed) if gates is not None else None

    def _quantize(
        self, adapter_name: str, site: Site, x: Tensor, gates: GateValues | None, *, record: bool = True
    ) -> Tensor:
        quantizer = self.quantizer_of(adapter_name, site)
        # What merging writes is rounded, whatever the mode.
        if quantizer is None or (record and site is Site.WEIGHT and self.runs_unrounded(adapter_name)):
            return x
        if isinstance(quantizer, FixedQuantizer) or gates is None:
            return quantizer(x)  # type: ignore[no-any-return]
        decided = self.gate_of(adapter_name, site)
        assert decided is not None, f"nothing decides about {site}"
        owner, row = decided
        owned = owner is self.gates_of(adapter_name)
        widths = gates.widths[row] if owned else owner.widths_of(row, hard=gates.hard)
        return owner.put_on_grid(quantizer, x, widths, hard=gates.hard) if record else quantizer.rounded(x, widths)

    def adapted_forward(self, x: Tensor) -> Tensor:
        """Output with the active adapters: [..., in_features] to [..., out_features]."""
        active = [name for name in self.active_adapters if name in self.bayesian_lora_down]
        if not any(self.effective_sites(name) for name in active):
            result = self._base_output(x)
            for name in active:
                result = result + self._update(name, x, self._pass_gates(name)).to(result.dtype)
            return result
        (name,) = active
        gates = self._pass_gates(name)
        x = self._read(name, x, gates)
        if self._rounds_the_sum(name):
            result = self._merged_product(name, x, gates)
        else:
            result = self._base_product(name, x, gates)
            result = result + self._update(name, x, gates).to(result.dtype)
        return self._write(name, result, gates)

    def merged_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output with the adapter written into the base weight: what quantizes activations still does."""
        names = [name for name in self.merged_adapters if self.effective_sites(name)]
        if not names:
            return super().merged_forward(x, *args, **kwargs)
        (name,) = names
        gates = self._gate_values(name)
        result = super().merged_forward(self._read(name, x, gates), *args, **kwargs)
        return self._write(name, result, gates)

    def _write(self, adapter_name: str, x: Tensor, gates: GateValues | None) -> Tensor:
        """The quantized output, except where an attention reads it and quantizes what it reads."""
        attended = self.operands[adapter_name] is not None
        return x if attended else self._quantize(adapter_name, Site.OUTPUT, x, gates)

    def quantize_attended(self, adapter_name: str, site: Site, x: Tensor) -> Tensor:
        """An operand of an attention that this layer made, or its probabilities, on the grid of their quantizer.

        Args:
            adapter_name: the adapter that acts, by `attending_adapter`.
            site: `OUTPUT` or `PROBABILITIES`.
            x: any shape.
        """
        quantizer, decided = self.quantizer_of(adapter_name, site), self.gate_of(adapter_name, site)
        if quantizer is None:
            return x
        if isinstance(quantizer, FixedQuantizer) or decided is None:
            return quantizer(x)  # type: ignore[no-any-return]
        hard = not self.training or self.phase[adapter_name].fixed
        gates, row = decided
        return gates.put_on_grid(quantizer, x, gates.widths_of(row, hard=hard), hard=hard)

    def _read(self, adapter_name: str, x: Tensor, gates: GateValues | None) -> Tensor:
        """The quantized input; made once for all layers that read it."""
        owner = self.owners[adapter_name].get(Site.INPUT, self)
        readers = owner.readers[adapter_name].get(Site.INPUT, ())
        return owner.shared_inputs[adapter_name].get(
            x, id(self), len(readers), lambda: self._quantize(adapter_name, Site.INPUT, x, gates)
        )

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
        weight = self._rounded_base(adapter_name, gates)
        x = self._cast_input_dtype(x, weight.dtype)
        return products.linear(x, weight, self.bias, rows=self._gradient_rows(adapter_name))

    def _rounded_base(self, adapter_name: str, gates: GateValues | None) -> Tensor:
        """Q_w(W0), made anew only where gates or range may have moved."""
        quantizer = self.quantizers_of(adapter_name)[Site.WEIGHT.value]
        weight = self.oriented(self.weight)

        def make() -> Tensor:
            return self._quantize(adapter_name, Site.WEIGHT, weight, gates)

        ranges = quantizer.log_range if isinstance(quantizer, Quantizer) else quantizer.fixed_range
        learns = isinstance(quantizer, Quantizer) and quantizer.learns and ranges.requires_grad
        moving = (learns or self.weight.requires_grad) and torch.is_grad_enabled()
        stands = quantizer.is_calibrated and not moving and not self.awaits_codes[adapter_name]
        if not stands or (gates is not None and not gates.hard):
            return make()
        decided = self.gate_of(adapter_name, Site.WEIGHT)
        logits = () if decided is None or decided[0].bit_logits is None else (decided[0].bit_logits,)
        offsets = () if quantizer.offsets is None else (quantizer.offsets,)
        return self.rounded_weights[adapter_name].get((self.weight, ranges, *logits, *offsets), make)

    def _update(self, adapter_name: str, x: Tensor, gates: GateValues | None) -> Tensor:
        """The scaled low-rank update: [..., in_features] to [..., out_features]."""
        down, diagonal, up = self._factors(adapter_name)
        down = self._quantize(adapter_name, Site.DOWN, down, gates)
        diagonal = self._quantize(adapter_name, Site.DIAGONAL, diagonal, gates)
        up = self._quantize(adapter_name, Site.UP, up, gates)
        if gates is not None and gates.ranks is not None:
            diagonal = diagonal * gates.ranks.to(diagonal.dtype)
        x = self.bayesian_lora_dropout[adapter_name](self._cast_input_dtype(x, down.dtype))
        hidden = self._quantize(adapter_name, Site.DOWN_OUTPUT, F.linear(x, down), gates)  # [..., r]
        hidden = hidden * diagonal.to(hidden.dtype)
        hidden = self._quantize(adapter_name, Site.DIAGONAL_OUTPUT, hidden, gates)
        # Scaled here, where a row has r numbers and not out_features.
        return F.linear(hidden * self.scaling[adapter_name], up)  # [..., out_features]

    def _merged_product(self, adapter_name: str, x: Tensor, gates: GateValues | None) -> Tensor:
        """Product with the quantized sum: [..., in_features] to [..., out_features]."""
        rows = self.weight_gradient_rows[adapter_name]
        if rows is None or not self.training:
            weight = self._rounded_sum(adapter_name, self.weight, gates)
            return F.linear(self._cast_input_dtype(x, weight.dtype), weight, self.bias)
        # Gates and range learn from some rows; A, E and B from all, token by token, as in LoRA.
        with torch.no_grad():
            total = self._sum(adapter_name, self.weight, gates)
        weight = self._quantize(adapter_name, Site.WEIGHT, total, gates).to(self.weight.dtype)
        down, diagonal, up = self._factors(adapter_name)
        if gates is not None and gates.ranks is not None:
            diagonal = diagonal * gates.ranks
        down, diagonal, up = down.to(weight.dtype), diagonal.to(weight.dtype), up.to(weight.dtype)
        update = products.LowRankUpdate(down, diagonal, up, self.scaling[adapter_name])
        x = self._cast_input_dtype(x, weight.dtype)
        return products.merged_linear(x, weight, self.bias, update, rows=self._gradient_rows(adapter_name))

    def _gradient_rows(self, adapter_name: str) -> int | None:
        # Not a question of whether gradients are on: a pass that will be recomputed has to draw the same numbers. And
        # squares of a gradient from some rows would hold the noise of their choice.
        learns = self.training and self.learns_weight_ranges[adapter_name] and not self.phase[adapter_name].stands
        return self.weight_gradient_rows[adapter_name] if learns else None

    def _rounded_sum(self, adapter_name: str, weight: Tensor, gates: GateValues | None) -> Tensor:
        """Q_w(W0 + s B diag(E g) A) in the dtype of the base weight: what runs, and what merging writes."""
        total = self._sum(adapter_name, weight, gates)
        return self._quantize(adapter_name, Site.WEIGHT, total, gates).to(weight.dtype)

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raise MergeError where no single weight computes what the layer computes (quantized activations).

        With the merged placement the quantizers of input and output stay in the layer, around the merged weight.
        """
        for name in adapter_names:
            separate = self.placement[name] is Placement.SEPARATE
            blocking = [site.value for site in self.effective_sites(name) if separate and site in ACTIVATION_SITES]
            if blocking:
                raise MergeError(
                    f"adapter {name!r} cannot be merged exactly: it quantizes the activations {blocking}, which no "
                    "weight can do. Adapters trained with placement='merged', with learn_bits=False, or with "
                    "quantizers=['weight', 'down', 'diagonal', 'up'], can be merged; this one runs unmerged"
                )
        together = {*adapter_names, *self.merged_adapters}
        for name in sorted(together):
            if self.effective_sites(name) and len(together) > 1:
                raise MergeError(
                    f"adapter {name!r} quantizes the base weight, so it can only be merged alone, not with "
                    f"{sorted(together - {name})}"
                )

    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        """The weight that alone computes what base and update compute, with the gates of inference whatever the mode.

        Q_w(W0) + s Q_b(B) diag(Q_e(E) g) Q_a(A), or Q_w(W0 + s B diag(E g) A).

        Args:
            adapter_name: which adapter.
            weight: [out_features, in_features], float32.
        """
        values = self._hard_gates(adapter_name)

        def rounded(site: Site, tensor: Tensor) -> Tensor:
            return self._quantize(adapter_name, site, tensor.to(torch.float32), values, record=False)

        if self._rounds_the_sum(adapter_name):
            return rounded(Site.WEIGHT, self._sum(adapter_name, self.oriented(weight), values))
        sites = (Site.DOWN, Site.DIAGONAL, Site.UP)
        down, diagonal, up = map(rounded, sites, self._factors(adapter_name))
        if values is not None and values.ranks is not None:
            diagonal = diagonal * values.ranks
        update = (up * diagonal) @ down * self.scaling[adapter_name]  # [out_features, in_features]
        return rounded(Site.WEIGHT, weight) + update

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True where the update is all the adapter does: without quantizers."""
        return not self.effective_sites(adapter_name)

    @torch.no_grad()
    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """The plain LoRA adapter that equals this one, for adapters without gates and quantizers.

        Args:
            adapter_name: which adapter.

        Returns:
            Copies of A [r, in_features] and B diag(E) [out_features, r] in at least float32, and the scale s: the
            update of x [..., in_features] is s * x A^T (B diag(E))^T. The rank r is the hardened one, which may be 0.

        Raises:
            ValueError: its ranks are not fixed yet, or it has quantizers.
        """
        if self.gates_of(adapter_name) is not None:
            raise ValueError(
                f"adapter {adapter_name!r} still has gates, which choose its ranks anew whenever they are trained: "
                "call rankbits.harden(model) first"
            )
        sites = [site.value for site in self.effective_sites(adapter_name)]
        if sites:
            raise ValueError(
                f"adapter {adapter_name!r} quantizes {sites}: what it adds to the base weight lies on learned grids, "
                "which no pair of factors beside the unrounded base can hold"
            )
        down, diagonal, up = (f.to(torch.promote_types(f.dtype, torch.float32)) for f in self._factors(adapter_name))
        return down.clone(), up * diagonal, self.scaling[adapter_name]

    @torch.no_grad()
    def input_moment(self, adapter_name: str, x: Tensor) -> Tensor:
        """Sum of x x^T over the inputs x [..., in_features] as they are rounded: [in_features, in_features] float32."""
        rows = self._read(adapter_name, x, self._hard_gates(adapter_name))
        rows = rows.reshape(-1, self.in_features).to(torch.float32)
        return rows.T @ rows

    def __repr__(self) -> str:
        return "bayesian_lora." + super().__repr__()
