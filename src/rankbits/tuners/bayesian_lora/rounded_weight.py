"""What the quantizer of an adapted weight rounds, when its ranges are fitted, and when its codes are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rankbits.quant.grid import BIT_WIDTHS, bits_of_gates
from rankbits.quant.quantizer import Quantizer
from rankbits.tuners.bayesian_lora.adapters import GatedAdapters
from rankbits.tuners.bayesian_lora.config import Placement, Site
from rankbits.tuners.bayesian_lora.layer_gates import GateValues


class RoundedWeight(GatedAdapters):
    """The weight of a Bayesian-LoRA layer as its quantizer sees it: W0, or W0 + s B diag(E g) A."""

    def _rounds_the_sum(self, adapter_name: str) -> bool:
        merged = self.placement[adapter_name] is Placement.MERGED
        return merged and Site.WEIGHT.value in self.quantizers_of(adapter_name)

    def _hard_gates(self, adapter_name: str) -> GateValues | None:
        gates = self.gates_of(adapter_name)
        return gates.values(hard=True) if gates is not None else None

    def _sum(self, adapter_name: str, weight: Tensor, gates: GateValues | None) -> Tensor:
        """W0 + s B diag(E g) A in float32, [out_features, in_features], whatever autocast would make of it."""
        down, diagonal, up = (factor.to(torch.float32) for factor in self._factors(adapter_name))
        if gates is not None and gates.ranks is not None:
            diagonal = diagonal * gates.ranks
        with torch.autocast(weight.device.type, enabled=False):
            update = (up * diagonal) @ down * self.scaling[adapter_name]
            return self.oriented(weight).to(torch.float32) + update

    @torch.no_grad()
    def _to_round(self, adapter_name: str) -> Tensor:
        """What the quantizer of the weight rounds, [out_features, in_features]."""
        if self._rounds_the_sum(adapter_name):
            return self._sum(adapter_name, self.weight, self._hard_gates(adapter_name))
        return self.oriented(self.weight).detach().to(torch.float32)

    def fit_weight_range(self, adapter_name: str, *, again: bool = False) -> None:
        """Fit the ranges of what the weight's quantizer rounds to the width it has now; once, or `again`."""
        found = self._learned_weight(adapter_name)
        if found is not None:
            quantizer, bits = found
            quantizer.fit(self._to_round(adapter_name), bits, again=again)

    def errors_of_fit(self, adapter_name: str, widths: Sequence[int]) -> Tensor:
        """Squared errors of the weights whose width this layer decides, with ranges as they are and as they will be.

        Args:
            adapter_name: which adapter.
            widths: at which they are rounded.

        Returns:
            [widths, 2] on the host: with the present ranges, and once they are fitted. Zeros where nothing is known.
        """
        total = torch.zeros(len(widths), 2)
        for layer in self.readers[adapter_name].get(Site.WEIGHT, (self,)):
            quantizer = layer.quantizers_of(adapter_name).get(Site.WEIGHT.value)
            if isinstance(layer, RoundedWeight) and isinstance(quantizer, Quantizer) and not layer.weight.is_meta:
                weight = layer._to_round(adapter_name)
                total += torch.stack([quantizer.errors_of_fit(weight, bits) for bits in widths]).cpu()
        return total

    def forget_rounding(self, adapter_name: str) -> None:
        """Fit ranges, and choose the codes of the weight, anew when widths are known."""
        for quantizer in self.quantizers_of(adapter_name).values():
            if isinstance(quantizer, Quantizer):
                quantizer.forget_fit()

    def is_rounded_last(self, adapter_name: str) -> bool:
        """Whether the weight, at the width it has now, is to be rounded after the last step and not before.

        Codes that make up for each other's errors keep doing so while the weight stands still, and W0 does; a sum moves
        as long as the update learns. At 2 bits rounding costs more than can be made up for, so that the update has to
        learn through it, from such codes on.
        """
        if not self.may_compensate(adapter_name) or not self._rounds_the_sum(adapter_name):
            return False
        found = self._learned_weight(adapter_name)
        return found is not None and found[1] > BIT_WIDTHS[0]

    def runs_unrounded(self, adapter_name: str) -> bool:
        """Whether passes read the weight as it is, because its codes are yet to be chosen."""
        return self.awaits_codes[adapter_name] or (self.training and self.learns_unrounded[adapter_name])

    def is_coarsest(self, adapter_name: str) -> bool:
        """Whether the weight has learned the smallest width there is."""
        found = self._learned_weight(adapter_name)
        return found is not None and found[1] == BIT_WIDTHS[0]

    def may_compensate(self, adapter_name: str) -> bool:
        """Whether the codes of the weight can make up for each other's errors."""
        quantizer = self.quantizers_of(adapter_name).get(Site.WEIGHT.value)
        return isinstance(quantizer, Quantizer) and quantizer.offsets is not None

    def awaits_compensation(self, adapter_name: str) -> bool:
        """Whether now, as a phase of the schedule begins, these codes are to be chosen."""
        phase = self.phase[adapter_name]
        last = self.is_rounded_last(adapter_name)
        return phase.fixed and self.may_compensate(adapter_name) and phase.completed == last

    def compensate(self, adapter_name: str, moment: Tensor) -> None:
        """Round the weight, from now on, so that the outputs for these inputs move least.

        Args:
            adapter_name: which adapter.
            moment: as `input_moment` gives it, summed over batches.
        """
        found = self._learned_weight(adapter_name)
        if found is not None:
            quantizer, bits = found
            quantizer.compensate(self._to_round(adapter_name), bits, moment)

    def _learned_weight(self, adapter_name: str) -> tuple[Quantizer, int] | None:
        """The quantizer of the weight and its width by the gates of inference, or None if none learns."""
        quantizer = self.quantizers_of(adapter_name).get(Site.WEIGHT.value)
        decided = self.gate_of(adapter_name, Site.WEIGHT)
        if not isinstance(quantizer, Quantizer) or decided is None or self.weight.is_meta:
            return None
        gates, row = decided
        return quantizer, int(bits_of_gates(gates.widths_of(row, hard=True)))

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

    @torch.no_grad()
    def cover_weights(self, adapter_name: str) -> None:
        """Widen the ranges of what is trained (A, E and B, or the sum) while it still grows from its start."""
        for quantizer, weight in self._weight_quantizers(adapter_name):
            quantizer.cover(weight)

    def _weight_quantizers(self, adapter_name: str) -> Iterator[tuple[Quantizer, Tensor]]:
        quantizers = self.quantizers_of(adapter_name)
        for site, factor in zip((Site.DOWN, Site.DIAGONAL, Site.UP), self._factors(adapter_name), strict=True):
            quantizer = quantizers.get(site.value)
            if isinstance(quantizer, Quantizer):
                yield quantizer, factor
        quantizer = quantizers.get(Site.WEIGHT.value)
        if isinstance(quantizer, Quantizer) and self._rounds_the_sum(adapter_name):
            yield quantizer, self._sum(adapter_name, self.weight, self._hard_gates(adapter_name))
