"""When weights get codes that make up for each other's errors, and the batches by which these are chosen.

The last batches before weights are rounded are run once more through the model, in evaluation and with these weights
unrounded, to see what its layers read.
"""

from __future__ import annotations

import base64
import io
import pickle
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from rankbits.errors import RankbitsWarning, ScheduleError
from rankbits.quant.quantizer import has_company
from rankbits.tuners.bayesian_lora import learning_adapters
from rankbits.tuners.bayesian_lora.config import Placement
from rankbits.tuners.bayesian_lora.layer import BayesianLoraLinear

PASSES = 16
"""Training passes whose inputs are kept."""
MOMENT_BYTES = 2**30
"""Layers are looked at together until what is kept of their inputs takes so much."""
STATE_NAME = "recent_passes"

Passes = Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
"""Positional and named inputs of forward passes."""


class Compensation:
    """Keeps the inputs of the last training passes before weights are rounded, and rounds them then.

    Args:
        model: what is trained.
        fixed_from: completed optimizer steps after which gates are fixed: each W0 is rounded then, and sums at 2 bits.
        total_steps: optimizer steps of the whole training, after which the other sums are rounded.

    Raises:
        ScheduleError: there are weights whose codes are to be chosen, and no steps with fixed gates, or no others.
    """

    def __init__(self, model: nn.Module, *, fixed_from: int, total_steps: int) -> None:
        self.model, self.total_steps = model, total_steps
        self.passes: deque[tuple[tuple[Any, ...], dict[str, Any]]] = deque(maxlen=PASSES)
        layers = list(_compensated(self.model))
        if layers and not 0 < fixed_from < total_steps:
            fixed = total_steps - min(fixed_from, total_steps)
            raise ScheduleError(
                f"rounding='compensated' chooses codes for widths that are fixed, but {fixed} of {total_steps} steps "
                "have fixed gates; expected phases (warm-up, ramp, fixed) that leave some steps with fixed gates and "
                "some before them, or rounding='nearest'"
            )
        sums = any(layer.placement_of(name) is Placement.MERGED for layer, name in layers)
        # Of sums as of W0 some may be rounded when their widths are known: those at 2 bits.
        self.at = ((fixed_from, total_steps) if sums else (fixed_from,)) if layers else ()
        self.keeps = False
        self._handle: RemovableHandle | None = None

    def advance(self, completed_steps: int) -> None:
        """Round what is to be rounded after so many optimizer steps, and keep passes where some will be."""
        due = []
        if completed_steps in self.at:
            due = [(layer, name) for layer, name in _compensated(self.model) if layer.awaits_compensation(name)]
        for layer, name in due:
            layer.fit_weight_range(name, again=True)
        if due and not self.passes:
            warnings.warn(
                f"no training pass of the model was seen in the last {PASSES} steps, so that nothing is known of the "
                "inputs of its layers: weights keep their nearest codes. Train the model that the schedule was made "
                "for, or one that calls it",
                RankbitsWarning,
                stacklevel=3,
            )
        elif due:
            compensate(self.model, due, self.passes)
        self.resume(completed_steps)

    def resume(self, completed_steps: int) -> None:
        """Keep the inputs of passes from now on if they may be needed: in the last `PASSES` steps before."""
        self.keeps = any(step - PASSES <= completed_steps < step for step in self.at)
        if not self.keeps:
            self.passes.clear()
        # From the first step to the last: a model that is compiled does not notice hooks that come later.
        if self.at and completed_steps < max(self.at) and self._handle is None:
            self._handle = self.model.register_forward_pre_hook(_Hook(self), with_kwargs=True)
        elif self._handle is not None and completed_steps >= max(self.at):
            self.stop()

    def stop(self) -> None:
        """Look at no further pass."""
        self.passes.clear()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def end(self, completed_steps: int) -> None:
        """Training is over, maybe early: say so if sums were to be rounded that keep their nearest codes now."""
        self.stop()
        layers = _compensated(self.model)
        waiting = [not layer.phase[name].fixed or layer.is_rounded_last(name) for layer, name in layers]
        if any(waiting) and completed_steps < max(self.at):
            warnings.warn(
                f"training ended after {completed_steps} of {self.total_steps} steps, before the codes of weights were "
                "chosen by rounding='compensated': they are the nearest ones",
                RankbitsWarning,
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """The passes that are kept, ready for JSON; nothing if there are none."""
        if not self.passes:
            return {}
        buffer = io.BytesIO()
        torch.save(list(self.passes), buffer)
        return {STATE_NAME: base64.b64encode(buffer.getvalue()).decode("ascii")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. ScheduleError if the inputs of the model are more than tensors and plain data."""
        self.passes.clear()
        if STATE_NAME not in state:
            return
        buffer = io.BytesIO(base64.b64decode(state[STATE_NAME]))
        try:
            self.passes.extend(torch.load(buffer, map_location="cpu", weights_only=True))
        except pickle.UnpicklingError as reason:
            raise ScheduleError(
                "the checkpoint keeps training passes whose inputs are more than tensors and plain data, which cannot "
                f"be read back: {str(reason).splitlines()[0]}. Resume from a checkpoint that is more than {PASSES} "
                "steps before weights are rounded"
            ) from reason

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the inputs of a pass if it is one of training."""
        if self.keeps and self.model.training and torch.is_grad_enabled():
            self.passes.append(_mapped(_copied, (args, kwargs)))


def _compensated(model: nn.Module) -> Iterator[tuple[BayesianLoraLinear, str]]:
    """Layers, and the names of their adapters, whose weights have codes that are chosen."""
    for layer, name, _ in learning_adapters(model):
        if isinstance(layer, BayesianLoraLinear) and layer.may_compensate(name):
            yield layer, name


class _Hook:
    """Hands the inputs of the model's passes on; copies and pickles of the model have one that hands on nothing."""

    def __init__(self, to: Compensation | None = None) -> None:
        self.to = to

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _hand_on(self, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _hand_on_eagerly(hook: _Hook, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if hook.to is not None:
        hook.to.keep(args, kwargs)


_hand_on: Any = torch.compiler.disable(_hand_on_eagerly)


@torch.no_grad()
def compensate(model: nn.Module, layers: Sequence[tuple[BayesianLoraLinear, str]], passes: Passes) -> None:
    """Round the weights of layers so that their outputs in these passes move least.

    Until all have their codes they run unrounded, as do those that are rounded later: what comes through nearest codes
    of few bits says little about what a layer is going to read.

    Args:
        model: it is run in evaluation, as often as `MOMENT_BYTES` asks for; its mode stays as it was.
        layers: and the names of their adapters.
        passes: inputs of the model.
    """
    with _awaiting_codes(model, layers):
        for some in _together(layers):
            moments = _moments(model, some, passes)
            for (layer, name), moment in zip(some, moments, strict=True):
                layer.compensate(name, moment)


@contextmanager
def _awaiting_codes(model: nn.Module, layers: Sequence[tuple[BayesianLoraLinear, str]]) -> Iterator[None]:
    """Run the weights of these layers unrounded, and those that are rounded later."""
    later = [(layer, name) for layer, name in _compensated(model) if layer.learns_unrounded[name]]
    waiting = [*layers, *later]
    for layer, name in waiting:
        layer.awaits_codes[name] = True
    try:
        yield
    finally:
        for layer, name in waiting:
            layer.awaits_codes[name] = False


def _moments(model: nn.Module, layers: Sequence[tuple[BayesianLoraLinear, str]], passes: Passes) -> list[Tensor]:
    """Second moment of the inputs of each layer over all passes, and over all processes."""
    moments = [
        torch.zeros(layer.in_features, layer.in_features, device=layer.device_of(name)) for layer, name in layers
    ]
    handles = []
    for (layer, name), moment in zip(layers, moments, strict=True):

        def add(module: nn.Module, args: tuple[Any, ...], name: str = name, moment: Tensor = moment) -> None:
            assert isinstance(module, BayesianLoraLinear)
            moment += module.input_moment(name, args[0])

        handles.append(layer.register_forward_pre_hook(add))
    device = next(model.parameters()).device
    try:
        with _evaluated(model):
            for inputs in passes:
                args, kwargs = _mapped(lambda tensor: tensor.to(device), inputs)
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if has_company():
        for moment in moments:
            torch.distributed.all_reduce(moment)
    return moments


def _together(
    layers: Sequence[tuple[BayesianLoraLinear, str]],
) -> Iterator[list[tuple[BayesianLoraLinear, str]]]:
    """Layers in order, cut where the moments of their inputs would take more than `MOMENT_BYTES`."""
    some: list[tuple[BayesianLoraLinear, str]] = []
    taken = 0
    for layer, name in layers:
        needed = 4 * layer.in_features**2
        if some and taken + needed > MOMENT_BYTES:
            yield some
            some, taken = [], 0
        some.append((layer, name))
        taken += needed
    if some:
        yield some


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _copied(tensor: Tensor) -> Tensor:
    # Loops may fill one buffer with every batch.
    return tensor.detach().clone()


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Tensors changed, wherever they are in containers that PyTorch knows."""
    return tree_map_only(Tensor, change, value)
