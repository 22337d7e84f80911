"""When weights get codes that make up for each other's errors, and the batches by which these are chosen.

The last batches before a weight is rounded are run once more through the model as it stands, in evaluation, to see
what its layers read.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rankbits.errors import RankbitsWarning
from rankbits.tuners.bayesian_lora import learning_adapters
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
        at: completed optimizer steps after which weights may have to be rounded, in order.
    """

    def __init__(self, model: nn.Module, *, at: Sequence[int]) -> None:
        self.model, self.at = model, tuple(at)
        self.passes: deque[tuple[tuple[Any, ...], dict[str, Any]]] = deque(maxlen=PASSES)
        self._keeps = False
        self._handle: RemovableHandle | None = None
        if any(True for _ in self._layers()):
            # From the first step on: a model that is compiled does not notice hooks that come later.
            keep: Any = torch.compiler.disable(self._keep)
            self._handle = model.register_forward_pre_hook(keep, with_kwargs=True)

    def advance(self, completed_steps: int) -> None:
        """Round what is to be rounded after so many optimizer steps, and keep passes where some will be."""
        if completed_steps in self.at:
            due = [(layer, name) for layer, name in self._layers() if layer.awaits_compensation(name)]
            if due and not self.passes:
                warnings.warn(
                    f"no training pass of the model was seen in the last {PASSES} steps, so that nothing is known of "
                    "the inputs of its layers: weights keep their nearest codes. Train the model that the schedule was "
                    "made for, or one that calls it",
                    RankbitsWarning,
                    stacklevel=3,
                )
            elif due:
                compensate(self.model, due, self.passes)
        self.resume(completed_steps)

    def resume(self, completed_steps: int) -> None:
        """Keep the inputs of passes from now on if they may be needed: in the last `PASSES` steps before."""
        self._keeps = any(step - PASSES <= completed_steps < step for step in self.at)
        if not self._keeps:
            self.passes.clear()
        if completed_steps >= max(self.at) and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def state_dict(self) -> dict[str, Any]:
        """The passes that are kept, ready for JSON; nothing if there are none."""
        if not self.passes:
            return {}
        buffer = io.BytesIO()
        torch.save(list(self.passes), buffer)
        return {STATE_NAME: base64.b64encode(buffer.getvalue()).decode("ascii")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.passes.clear()
        if STATE_NAME in state:
            buffer = io.BytesIO(base64.b64decode(state[STATE_NAME]))
            self.passes.extend(torch.load(buffer, map_location="cpu", weights_only=True))

    def _layers(self) -> Iterator[tuple[BayesianLoraLinear, str]]:
        for layer, name, _ in learning_adapters(self.model):
            if isinstance(layer, BayesianLoraLinear) and layer.may_compensate(name):
                yield layer, name

    def _keep(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._keeps and self.model.training and torch.is_grad_enabled():
            self.passes.append(_mapped(_detached, (args, kwargs)))


@torch.no_grad()
def compensate(model: nn.Module, layers: Sequence[tuple[BayesianLoraLinear, str]], passes: Passes) -> None:
    """Round the weights of layers so that their outputs in these passes move least.

    Args:
        model: it is run in evaluation, as often as `MOMENT_BYTES` asks for; its mode stays as it was.
        layers: and the names of their adapters.
        passes: inputs of the model.
    """
    for some in _together(layers):
        moments = _moments(model, some, passes)
        for (layer, name), moment in zip(some, moments, strict=True):
            layer.compensate(name, moment)


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
    if torch.distributed.is_available() and torch.distributed.is_initialized():
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


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _mapped(change: Any, value: Any) -> Any:
    """Tensors changed, wherever they are in tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(change, each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(change, each) for each in value)
    return value
