"""Modules that own the range of one tensor and put it on a grid, given the values of its width gates."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from rankbits.errors import RankbitsWarning
from rankbits.quant import kernels
from rankbits.quant.codes import code_limits, round_to_grid, step_at
from rankbits.quant.company import has_company
from rankbits.quant.compensation import compensating_offsets
from rankbits.quant.fixed_quantizer import round_with_offsets
from rankbits.quant.float32_state import Float32State
from rankbits.quant.grid import (
    PER_TENSOR,
    UNROUNDED_WIDTH,
    Granularity,
    RangeLayout,
    Signedness,
    bits_of_gates,
    covering_logarithm,
)
from rankbits.quant.scales import headroom as scale_headroom
from rankbits.quant.scales import stored_ranges
from rankbits.quant.weight_fit import RANGE_FLOOR, best_ranges


class _Identity(torch.autograd.Function):
    """The input unchanged, with zero instead of no gradient for range and gates, as data-parallel training needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_range: Tensor, gates: Tensor) -> Tensor:
        # Not the range itself: calibration may end, and write it, before the backward pass.
        ctx.zeros = torch.zeros_like(log_range), torch.zeros_like(gates) if gates.is_floating_point() else None
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return grads[0], *ctx.zeros


class Quantizer(Float32State):
    """A learned range, found by calibration first.

    For the first `calibration_passes` training passes the module is the identity and records the largest magnitude;
    from then on the range is `exp(log_range)`, positive by construction and trained with the rest (method of van
    Baalen et al. 2020, with a running maximum instead of the first batch). While nothing but zeros was seen it keeps
    recording. Evaluated before calibration it is the identity, and says so once. Under activation checkpointing, run
    one backward pass for each forward pass while calibrating: two would be recomputed in the mode of the second.

    Args:
        calibration_passes: number of training passes to record, >= 0. Recomputed passes do not count.
        signedness: side of zero that the range covers; `AUTO` becomes unsigned iff no negative value was recorded, and
            so does `AFFINE` until ranges with low ends of their own are fitted (`settle`).
        headroom: the calibrated range is this factor times the recorded maximum.
        layout: which elements share a range.
        shape: of the weight, or (in,) of what a layer reads, where ranges are finer than the tensor or codes offset.
        compensated: whether codes of a weight can be offset from the nearest ones (`compensate`).
        full: whether a grid at a single width has all codes of it; `fit` then chooses each range's side of zero.
    """

    learns = True
    """Whether the range is trained; see `let_learn`."""
    fits_passes = False
    """Whether the range, of an activation, is fitted to what some passes show once its width is known (`RangeFit`)."""
    log_range: nn.Parameter
    maximum: Tensor
    passes: Tensor
    calibrated: Tensor
    seen_negative: Tensor
    fitted: Tensor
    offsets: Tensor | None
    sides: Tensor | None
    lows: Tensor | None

    def __init__(
        self,
        *,
        calibration_passes: int,
        signedness: Signedness = Signedness.SIGNED,
        headroom: float = 1.0,
        layout: RangeLayout = PER_TENSOR,
        shape: tuple[int, ...] = (),
        compensated: bool = False,
        full: bool = False,
    ) -> None:
        super().__init__()
        self.calibration_passes = calibration_passes
        self.signedness = signedness
        self.headroom = headroom
        self.layout = layout
        self.shape = shape
        self.full = full
        ranges = layout.range_shape(shape)
        self.log_range = nn.Parameter(torch.zeros(ranges, dtype=torch.float32))
        self.register_buffer("maximum", torch.zeros(ranges, dtype=torch.float32))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        self.register_buffer("seen_negative", torch.zeros((), dtype=torch.bool))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.register_buffer("offsets", torch.zeros(shape, dtype=torch.int8) if compensated else None)
        self.register_buffer("sides", torch.ones(ranges, dtype=torch.int8) if full else None)
        self.register_buffer("lows", torch.zeros(ranges) if signedness is Signedness.AFFINE else None)
        self._known: tuple[bool, bool] | None = None
        self._warned = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known = None

    def _host_state(self) -> tuple[bool, bool]:
        """(calibrated, signed) as Python values: read from the device once and after each change, not in each pass."""
        if self._known is None:
            signed = self.signedness is Signedness.SIGNED or (
                self.signedness is not Signedness.UNSIGNED and bool(self.seen_negative)
            )
            # The grid above a low end is the one of values that are not negative.
            signed = signed and not (self.lows is not None and bool(self.lows.any()))
            self._known = (bool(self.calibrated), signed)
        return self._known

    @property
    def is_calibrated(self) -> bool:
        """Whether the range is known, so that the module quantizes."""
        return self._host_state()[0]

    @property
    def knows_its_range(self) -> bool:
        """Whether it is calibrated, and that is known without asking the device."""
        return self._known is not None and self._known[0]

    @property
    def has_seen_values(self) -> bool:
        """Whether there is a range, or a recorded maximum to make one of."""
        return self.is_calibrated or (not self.maximum.is_meta and float(self.maximum.amax()) > RANGE_FLOOR)

    @property
    def is_signed(self) -> bool:
        """Whether the grid covers both sides of zero; meaningful once calibrated."""
        return self._host_state()[1]

    def let_learn(self, learns: bool) -> None:
        """Train the range from now on, or keep it.

        A data-parallel wrapper averages the gradients of what was trainable when it was made. Where there are several
        processes, a range that is kept is trainable without getting a gradient.
        """
        self.learns = learns
        self.requires_grad_(learns or has_company())

    def _logarithms(self) -> Tensor:
        return self.log_range if self.learns else self.log_range.detach()

    @property
    def range_(self) -> Tensor:
        """The ranges in the units of the tensor, float32, differentiable in `log_range`.

        A scalar, or of the layout's `range_shape`: it broadcasts over `layout.parts` of the tensor. Positive, but for
        those of a full grid whose additional code lies above zero.
        """
        ranges = self._logarithms().exp()
        if self.sides is not None:
            ranges = ranges * self.sides
        return self._of_parts(ranges)

    def _of_parts(self, values: Tensor) -> Tensor:
        """One value for each range, such that they broadcast over `layout.parts`."""
        return values.squeeze(0) if self.layout.granularity is Granularity.TENSOR else values

    @property
    def low_(self) -> Tensor | None:
        """Where each range begins, of the shape of `range_`; None where all lie around zero or begin there."""
        return None if self.lows is None else self._of_parts(self.lows)

    @torch.no_grad()
    def settle(self, ranges: Tensor, lows: Tensor | None = None) -> None:
        """Take over ranges that were fitted.

        Args:
            ranges: positive, as many as there are. Where they begin at low ends, the distances to the high ends.
            lows: low ends; none leaves ranges around zero, or beginning there, as they are.
        """
        self.log_range.copy_(ranges.reshape(self.log_range.shape).log())
        if lows is not None and self.lows is not None:
            self.lows.copy_(lows.reshape(self.lows.shape))
            self._known = None

    def range_at(self, bits: Tensor | int) -> Tensor:
        """The ranges that are stored with codes of one width; of the shape of `range_`, and differentiable like it."""
        if self.layout.scale_bits == 32:
            return self.range_
        # Before the fit a range is the largest magnitude, which a step that is rounded down would clip.
        room = torch.where(self.fitted, 1.0, scale_headroom(self.layout.scale_bits))
        return self._storable(self.range_ * room, bits)

    def _storable(self, ranges: Tensor, bits: Tensor | int) -> Tensor:
        return stored_ranges(ranges, bits, self.layout.scale_bits, signed=self.is_signed)

    @property
    def range_count(self) -> int:
        """How many ranges there are: what is stored beside the codes."""
        return self.log_range.numel()

    @property
    def bound_count(self) -> int:
        """How many numbers are kept of the ranges: their low ends are, too, where they have any."""
        return self.range_count * (1 if self.lows is None else 2)

    @torch.no_grad()
    def record(self, x: Tensor) -> None:
        """Take the magnitudes of one pass into the running maximum; NaN and infinite values are left out."""
        self.passes += 1
        if x.numel() == 0:
            return
        values = x.detach().to(torch.float32)
        largest = self._magnitudes(values)
        if not bool(torch.isfinite(largest).all()):
            largest = self._magnitudes(torch.where(torch.isfinite(values), values, 0.0))
            warnings.warn("a quantizer saw NaN or infinite values while calibrating", RankbitsWarning, stacklevel=2)
        # The weight that is recorded at construction may be on a device that this module has yet to be moved to.
        torch.maximum(self.maximum, largest.to(self.maximum.device), out=self.maximum)
        self.seen_negative |= ((x < 0) & torch.isfinite(x)).any().to(self.seen_negative.device)

    def _magnitudes(self, x: Tensor) -> Tensor:
        """Largest magnitude of each part; what rows share a range are looked at together."""
        if self.layout.granularity is Granularity.GROUP and x.dim() > len(self.shape):
            x = x.abs().flatten(0, -len(self.shape) - 1).amax(dim=0)
        return self.layout.magnitudes(x)

    @torch.no_grad()
    def finish_calibration(self) -> bool:
        """End calibration now, with what was recorded; false, and still calibrating, if only zeros were seen."""
        if self.maximum.is_meta:
            return False
        if self.is_calibrated:
            return True
        if has_company():
            seen = torch.cat([self.maximum.flatten(), self.seen_negative.to(torch.float32).reshape(1)])
            torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
            self.maximum.copy_(seen[:-1].reshape(self.maximum.shape))
            self.seen_negative.copy_(seen[-1] > 0)
        if float(self.maximum.amax()) <= RANGE_FLOOR:
            return False
        # A part of nothing but zeros has the least range there is until its weights grow; activations do not wait.
        idle = self.maximum.amax() if len(self.shape) == 1 else RANGE_FLOOR
        largest = torch.where(self.maximum > RANGE_FLOOR, self.maximum, idle)
        self.log_range.copy_(covering_logarithm(largest) + math.log(self.headroom))
        self.calibrated.fill_(True)
        self._known = None
        return True

    def calibrate_to(self, x: Tensor) -> None:
        """Calibrate at once to a tensor that does not change, such as a frozen weight."""
        if not x.is_meta:
            self.record(x)
            self.finish_calibration()

    @torch.no_grad()
    def cover(self, x: Tensor) -> None:
        """Widen the ranges to the largest magnitudes of `x`: a clipped weight gets no gradient to come back."""
        if self.is_calibrated and x.numel():
            largest = self._magnitudes(x.detach().to(torch.float32)).clamp(min=RANGE_FLOOR)
            torch.maximum(self.log_range, covering_logarithm(largest), out=self.log_range)

    @torch.no_grad()
    def fit(self, x: Tensor, bits: int, *, again: bool = False) -> None:
        """Choose the ranges of a weight for one width, once: a second call changes nothing unless it says so.

        Which ones these are says `weight_fit.best_ranges`.

        Args:
            x: the weight.
            bits: 2, 4, 8, 16 or 32.
            again: whether to fit, too, what was fitted before; codes are the nearest ones then.
        """
        if not self.is_calibrated or (bool(self.fitted) and not again):
            return
        self.forget_fit()
        ranges = self._best_ranges(x, bits)
        self.log_range.copy_(ranges.abs().log())
        if self.sides is not None:
            self.sides.copy_(ranges.sign())
        self.fitted.fill_(True)

    def _best_ranges(self, x: Tensor, bits: int) -> Tensor:
        return best_ranges(x, bits, layout=self.layout, signed=self.is_signed, full=self.full)

    @torch.no_grad()
    def errors_of_fit(self, x: Tensor, bits: int) -> Tensor:
        """[2] squared errors of rounding a weight to a width: with the present ranges, and once they are fitted.

        Args:
            x: the weight.
            bits: 2, 4, 8, 16 or 32.

        Returns:
            On the device of `x`; zeros while there is no range.
        """
        if not self.is_calibrated:
            return torch.zeros(2, device=x.device)
        parts = self.layout.parts(x.detach().to(torch.float32))
        now = round_to_grid(parts, self.range_, bits, signed=self.is_signed)
        ranges = self._storable(self._best_ranges(x, bits).reshape(self.range_.shape), bits)
        then = round_to_grid(parts, ranges, bits, signed=self.is_signed, full=self.full)
        return torch.stack([(rounded - parts).square().sum() for rounded in (now, then)])

    @torch.no_grad()
    def forget_fit(self) -> None:
        """Take the nearest codes and ranges around zero again, and let the next fit choose."""
        self.fitted.fill_(False)
        if self.offsets is not None:
            self.offsets.zero_()
        if self.sides is not None:
            self.sides.fill_(1)
        if self.lows is not None and bool(self.lows.any()):
            ends = torch.stack([self.lows, self.lows + self.log_range.exp()])
            self.log_range.copy_(ends.abs().amax(dim=0).clamp(min=RANGE_FLOOR).log())
            self.lows.zero_()
            self._known = None

    @torch.no_grad()
    def compensate(self, x: Tensor, bits: int, moment: Tensor) -> None:
        """Offset the codes of a weight so that the outputs of its layer move least.

        Args:
            x: the weight [out_features, in_features] that will be rounded.
            bits: 2, 4, 8, 16 or 32; numbers of 32 bits are not rounded.
            moment: [in_features, in_features], sum of x x^T over inputs x of the layer.
        """
        if self.offsets is None or not self.is_calibrated or bits >= UNROUNDED_WIDTH:
            return
        parts = self.layout.parts(x)
        step = step_at(self.range_at(bits), bits, signed=self.is_signed).expand_as(parts).reshape(x.shape)
        low, high = code_limits(torch.tensor(float(bits)), signed=self.is_signed, full=self.full)
        self.offsets.copy_(compensating_offsets(x, step, (int(low), int(high)), moment))

    def _passes_through(self, x: Tensor) -> bool:
        """Whether this pass is the identity; records it if it is a calibration pass."""
        if self.is_calibrated:
            return False
        # Inside backward this is a recomputed pass: it must repeat what the first one did, and count nothing.
        if torch._C._current_graph_task_id() != -1:
            return True
        if not self.training:
            if not self._warned:
                self._warned = True
                text = "a quantizer is evaluated before its range was calibrated: it is the identity"
                warnings.warn(text, RankbitsWarning, stacklevel=3)
            return True
        if int(self.passes) >= self.calibration_passes and self.finish_calibration():
            return False
        self.record(x)
        return True

    def forward(self, x: Tensor, gates: Tensor, *, hard: bool, cover: bool = False, rounds: bool = True) -> Tensor:
        """Quantize, or record while calibrating.

        Args:
            x: values, any shape.
            gates: [4] values of the gates of 4, 8, 16 and 32 bits; for `hard`, bool and chained.
            hard: round at one width (evaluation, fixed-gate phase) instead of summing gated residuals.
            cover: widen the range to the largest magnitude of `x` first, so that nothing is clipped.
            rounds: false returns `x` itself where a range is known.

        Returns:
            Tensor of the shape and dtype of `x`.
        """
        if self._passes_through(x):
            result: Tensor = _Identity.apply(x, self._logarithms(), gates)  # type: ignore[no-untyped-call]
            return result
        if cover:
            # Not before: a pass in which calibration ends is recomputed with the range that it has then.
            self.cover(x)
        if not rounds:
            return x
        if hard:
            return self.rounded(x, gates)
        parts, low = self.layout.parts(x), self.low_
        if low is None:
            return kernels.quantize(parts, self.range_, gates, signed=self.is_signed).reshape(x.shape)
        above = kernels.quantize(parts - low, self.range_, gates, signed=self.is_signed)
        return (above + low).to(x.dtype).reshape(x.shape)

    def rounded(self, x: Tensor, gates: Tensor) -> Tensor:
        """`x` at the width of hard, chained gates [4]; `x` itself while there is no range. Records nothing."""
        if not self.is_calibrated:
            return x
        bits = bits_of_gates(gates)
        return round_with_offsets(self, x, self.range_at(bits), bits)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        granularity = self.layout.granularity.value
        return f"calibration_passes={self.calibration_passes}, {self.signedness.value}, one range per {granularity}"
