"""What is chosen by what layers read in the last training passes: ranges of activations, and codes of weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from rankbits.errors import RankbitsWarning, ScheduleError
from rankbits.training.activation_ranges import (
    Fits,
    expect_fitted_ranges,
    fitted_quantizers,
    range_fits,
    settle_ranges,
)
from rankbits.training.compensation import compensate, compensated
from rankbits.training.passes import PASSES, RecentPasses
from rankbits.training.processes import Reduction, agree
from rankbits.tuners.bayesian_lora.config import Placement


class Replay:
    """Runs the last training passes once more as widths become known, and after the last step, and chooses by them.

    Args:
        model: what is trained.
        fixed_from: completed optimizer steps after which gates are fixed: ranges of activations are fitted then, each
            W0 is rounded, and sums at 2 bits.
        total_steps: optimizer steps of the whole training, after which the other sums are rounded.

    Raises:
        ScheduleError: there are ranges or codes to be chosen, and no steps with fixed gates, or no others.
    """

    def __init__(self, model: nn.Module, *, fixed_from: int, total_steps: int) -> None:
        self.model, self.fixed_from, self.total_steps = model, fixed_from, total_steps
        layers = list(compensated(model))
        choices = []
        if layers:
            choices.append(("rounding='compensated' chooses codes", "rounding='nearest'"))
        if fitted_quantizers(model):
            choices.append(("activation_ranges fits ranges", "activation_ranges='largest'"))
        for what, otherwise in choices:
            if not 0 < fixed_from < total_steps:
                raise ScheduleError(
                    f"{what} for widths that are fixed, but {total_steps - min(fixed_from, total_steps)} of "
                    f"{total_steps} steps have fixed gates; expected phases (warm-up, ramp, fixed) that leave some "
                    f"steps with fixed gates and some before them, or {otherwise}"
                )
        sums = any(layer.placement_of(name) is Placement.MERGED for layer, name in layers)
        # Of sums as of W0 some may be rounded when their widths are known: those at 2 bits.
        at = (fixed_from, total_steps) if sums else (fixed_from,)
        self.recent = RecentPasses(model, at if choices else ())
        self._fits: Fits = {}

    def look_ahead(self, completed_steps: int) -> None:
        """Before gates are chosen: see what ranges of activations will be, and let the evidence for gates know."""
        if completed_steps == self.fixed_from and fitted_quantizers(self.model) and self._anybody_saw_a_pass():
            self._fits = range_fits(self.model, self.recent.passes)
            expect_fitted_ranges(self.model, self._fits)

    def advance(self, completed_steps: int) -> None:
        """Choose what is to be chosen after so many optimizer steps, and keep passes where they will be needed."""
        ranges = completed_steps == self.fixed_from and bool(fitted_quantizers(self.model))
        codes = []
        if completed_steps in self.recent.at:
            codes = [(layer, name) for layer, name in compensated(self.model) if layer.awaits_compensation(name)]
        for layer, name in codes:
            layer.fit_weight_range(name, again=True)
        if (ranges or codes) and not self._anybody_saw_a_pass():
            kept = [
                *(["activations keep their ranges"] if ranges else []),
                *(["weights keep their nearest codes"] if codes else []),
            ]
            warnings.warn(
                f"no training pass of the model was seen in the last {PASSES} steps, so that nothing is known of the "
                f"inputs of its layers: {' and '.join(kept)}. Train the model that the schedule was made for, or one "
                "that calls it",
                RankbitsWarning,
                stacklevel=3,
            )
        elif ranges or codes:
            # First the ranges: codes make up for each other in what a layer reads once it is rounded.
            settle_ranges(self.model, self._fits)
            compensate(self.model, codes, self.recent.passes)
        self._fits = {}
        self.recent.resume(completed_steps)

    def _anybody_saw_a_pass(self) -> bool:
        """Whether this process or another kept a pass: all take part in what follows, or none."""
        seen = torch.tensor([float(bool(self.recent.passes))], device=next(self.model.parameters()).device)
        agree([seen], Reduction.MAXIMUM)
        return bool(seen)

    def resume(self, completed_steps: int) -> None:
        """Continue after so many optimizer steps."""
        self.recent.resume(completed_steps)

    def end(self, completed_steps: int) -> None:
        """Training is over, maybe early: say so if something was to be chosen later that stays as it is now."""
        at = self.recent.at
        self.recent.stop()
        layers = compensated(self.model)
        waiting = [not layer.phase[name].fixed or layer.is_rounded_last(name) for layer, name in layers]
        ended = f"training ended after {completed_steps} of {self.total_steps} steps, before the"
        if any(waiting) and completed_steps < max(at):
            text = f"{ended} codes of weights were chosen by rounding='compensated': they are the nearest ones"
            warnings.warn(text, RankbitsWarning, stacklevel=3)
        if completed_steps < self.fixed_from and fitted_quantizers(self.model):
            text = f"{ended} ranges of activations were fitted by activation_ranges: they stay as they are"
            warnings.warn(text, RankbitsWarning, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """The passes that are kept, ready for JSON; nothing if there are none."""
        return self.recent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. ScheduleError if the inputs of the model are more than tensors and plain data."""
        self.recent.load_state_dict(state)
