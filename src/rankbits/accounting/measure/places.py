"""Which module runs, by the name it has in the base model, and whose work it does there: the base's or an adapter's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from rankbits.accounting.measure.provenance import Mark, Provenance, tensors_in
from rankbits.accounting.measure.quantized import opaque_weight_bits

_WRAPPERS = re.compile(
    r"(^|\.)_orig_mod(?=\.|$)|\.base_layer(?=\.|$)|\.modules_to_save\.[^.]+|\.original_module(?=\.|$)|^base_model(?=\.)"
)
"""What torch.compile and PEFT put between the parts of a name."""
_ROLES = {
    "q": re.compile(r"(^|_)(q|query)(_proj|_lin|$)"),
    "k": re.compile(r"(^|_)(k|key)(_proj|_lin|$)"),
    "v": re.compile(r"(^|_)(v|value)(_proj|_lin|$)"),
}
"""Last names of the layers that make queries, keys and values."""
HEADS = frozenset({"lm_head", "embed_out"})
"""Last names of output embeddings that models do not declare."""


def base_name(name: str) -> str:
    """A qualified name as the base model has it, without what wraps its modules."""
    return _WRAPPERS.sub("", name).removeprefix(".")


def role_of(name: str) -> str | None:
    """q, k or v for the layer of that name, None for any other."""
    last = name.rpartition(".")[2]
    return next((role for role, pattern in _ROLES.items() if pattern.search(last)), None)


@dataclass(slots=True)
class Call:
    """One running call of a module.

    Args:
        module: the module.
        name: its qualified name in the model that was given.
        tainted: whether its input depends on the input of the model.
        opaque_bits: width of its weight, where its kernel cannot be looked into.
        integer: whether an integer product ran inside.
    """

    module: nn.Module
    name: str
    tainted: bool
    opaque_bits: int | None = None
    integer: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a product runs: name of the module, adapter (None: base model), and whether that layer's input varies."""

    module: str
    adapter: str | None
    tainted: bool

    @property
    def runs_anew(self) -> bool:
        """Whether even what is made of weights alone runs at each call here: an adapter makes it for its layer."""
        return self.adapter is not None and self.tainted


class Places:
    """The calls that are running, innermost last, and the names of all modules of a model.

    Args:
        root: the model.
        provenance: what is known of tensors.
        learned: hard widths of quantizer modules, by their identity.
    """

    def __init__(self, root: nn.Module, provenance: Provenance, learned: dict[int, int]) -> None:
        self.running: list[Call] = []
        self.finished_opaque: list[tuple[Call, Tensor, Tensor]] = []
        self._names = {id(module): name for name, module in root.named_modules()}
        self._provenance = provenance
        self._learned = learned
        self._heads = {id(module) for module in _output_embeddings(root)}

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow every call while the context lasts; no module is touched."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def inside_opaque(self) -> Call | None:
        """The running call whose kernel cannot be looked into, if there is one."""
        return next((call for call in self.running if call.opaque_bits is not None), None)

    def here(self) -> str:
        """Name of the module that runs, as given; empty for the model itself."""
        return self.running[-1].name if self.running else ""

    def described(self) -> str:
        """The module that runs, for a message: its name and class."""
        if not self.running:
            return "the model"
        return f"{self.here() or 'the model'!r} ({type(self.running[-1].module).__name__})"

    def place(self, weight: str | None) -> Place:
        """Where a product runs whose right operand is the parameter `weight`, or none."""
        if not self.running:
            return Place("", None, tainted=True)
        innermost = self.running[-1]
        for index in range(len(self.running) - 1, -1, -1):
            call = self.running[index]
            if isinstance(call.module, BaseTunerLayer):
                base = getattr(call.module, "base_layer", None)
                in_base = any(inner.module is base for inner in self.running[index + 1 :])
                if in_base or (weight is not None and ".base_layer." in f".{weight}"):
                    return Place(base_name(innermost.name), None, tainted=call.tainted)
                return Place(base_name(call.name), _adapter(call.module, weight), tainted=call.tainted)
        return Place(base_name(innermost.name), None, tainted=innermost.tainted)

    def role_here(self) -> str | None:
        """q, k or v if the layer that makes them runs."""
        return role_of(base_name(self.here()))

    def is_head(self, finished: Call | None = None) -> bool:
        """Whether the module that runs, or one that has just finished, is the output embedding of a language model."""
        calls = [*self.running, finished] if finished is not None else self.running
        return any(id(call.module) in self._heads for call in calls)

    def _enter(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(id(module))
        if name is None:
            name = self.here()
        operands = list(tensors_in(args))
        tainted = not operands or self._provenance.is_tainted(operands)
        self.running.append(Call(module, name, tainted, opaque_weight_bits(module)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self.running and self.running[-1].module is not module:
            self.running.pop()
        if not self.running:
            return
        call = self.running.pop()
        if not isinstance(output, Tensor):
            return
        mark = self._provenance.of(output)
        if id(module) in self._learned:
            self._quantized(args[0], output, self._learned[id(module)])
        elif call.opaque_bits is not None and args and isinstance(args[0], Tensor):
            self._provenance.put(output, Mark(tainted=call.tainted))
            self.finished_opaque.append((call, args[0], output))
        if _is_projection(module):
            self._name_role(call, output, mark)

    def _quantized(self, before: Tensor, after: Tensor, bits: int) -> None:
        if before.untyped_storage()._cdata == after.untyped_storage()._cdata:
            return
        known = self._provenance.of(before)
        self._provenance.put(after, Mark(known.name, bits, known.tainted, known.weight))

    def _name_role(self, call: Call, output: Tensor, mark: Mark) -> None:
        role = role_of(base_name(call.name))
        if role is not None:
            name = role if call.tainted else f"pos_{role}"
            self._provenance.put(output, Mark(name, self._provenance.of(output).bits, mark.tainted))


def _is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _adapter(layer: BaseTunerLayer, weight: str | None) -> str:
    active = list(layer.active_adapters)
    parts = (weight or "").split(".")
    return next((name for name in active if name in parts), active[0] if active else "default")


def _output_embeddings(root: nn.Module) -> Iterator[nn.Module]:
    declared = getattr(root, "get_output_embeddings", None)
    module = declared() if callable(declared) else None
    if isinstance(module, nn.Module):
        yield module
    for name, child in root.named_modules():
        if base_name(name).rpartition(".")[2] in HEADS:
            yield child
