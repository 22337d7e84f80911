"""The last training passes of a model: kept where something will be chosen by them, and run once more then."""

from __future__ import annotations

import base64
import io
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from rankbits.errors import ScheduleError

PASSES = 16
"""Training passes whose inputs are kept."""
STATE_NAME = "recent_passes"

Passes = Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
"""Positional and named inputs of forward passes."""


class RecentPasses:
    """Keeps the inputs of the last training passes before given moments.

    Args:
        model: what is trained.
        at: numbers of completed optimizer steps after which the passes are asked for; none keeps nothing.
    """

    def __init__(self, model: nn.Module, at: Sequence[int]) -> None:
        self.model, self.at = model, at
        self.passes: deque[tuple[tuple[Any, ...], dict[str, Any]]] = deque(maxlen=PASSES)
        self.keeps = False
        self._handle: RemovableHandle | None = None

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
                "steps before they are needed"
            ) from reason

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the inputs of a pass if it is one of training."""
        if self.keeps and self.model.training and torch.is_grad_enabled():
            self.passes.append(_mapped(_copied, (args, kwargs)))


class _Hook:
    """Hands the inputs of the model's passes on; copies and pickles of the model have one that hands on nothing."""

    def __init__(self, to: RecentPasses | None = None) -> None:
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


def run_again(model: nn.Module, passes: Passes) -> None:
    """Run passes through a model in evaluation, without gradients; afterwards each module is in the mode it was in."""
    device = next(model.parameters()).device
    # Not compiled: hooks that are there for these passes alone would go unnoticed.
    with torch.no_grad(), _evaluated(model), torch.compiler.set_stance("force_eager"):
        for inputs in passes:
            args, kwargs = _mapped(lambda tensor: tensor.to(device), inputs)
            model(*args, **kwargs)


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
