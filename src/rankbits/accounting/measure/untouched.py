"""Running a model without leaving a trace: modes, attributes, buffers and random state are put back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = ("_parameters", "_buffers", "_modules")


class _Remembered:
    """Everything one module holds: its attributes, the entries of its containers, and the values of its buffers.

    Layers of bitsandbytes rearrange their weight and its scales when they first run, inside objects of their own and
    inside their parameters; these are remembered too.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes: dict[str, Any] = dict(vars(module))
        self.entries = {name: dict(getattr(module, name)) for name in CONTAINERS}
        buffers = self.entries["_buffers"].values()
        self.values = [(buffer, buffer.clone()) for buffer in buffers if isinstance(buffer, Tensor)]
        foreign = [value for value in self.attributes.values() if _is_foreign(value)]
        parameters = [value for value in self.entries["_parameters"].values() if _is_foreign(value)]
        self.objects = [(value, dict(vars(value))) for value in foreign + parameters]
        self.data = [(parameter, parameter.data) for parameter in parameters]

    def put_back(self) -> None:
        _refill(vars(self.module), self.attributes)
        for name, entries in self.entries.items():
            _refill(getattr(self.module, name), entries)
        for buffer, value in self.values:
            if not buffer.is_meta and not torch.equal(buffer, value):
                buffer.copy_(value)
        for parameter, data in self.data:
            parameter.data = data
        for value, attributes in self.objects:
            _refill(vars(value), attributes)


def _is_foreign(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "bitsandbytes"


def _refill(target: dict[str, Any], entries: dict[str, Any]) -> None:
    target.clear()
    target.update(entries)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluate a model inside: eval mode, no gradients, no fused or compiled kernels, no warnings.

    Afterwards, also after an error, every module has the attributes, buffers and mode it had, and the random
    generators of the CPU and of the model's devices their state.
    """
    remembered = [_Remembered(module) for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    devices = {parameter.device.index or 0 for parameter in model.parameters() if parameter.device.type == "cuda"}
    fused = torch.backends.mha.get_fastpath_enabled()
    with (
        torch.random.fork_rng(devices=sorted(devices)),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module in remembered:
                module.put_back()
