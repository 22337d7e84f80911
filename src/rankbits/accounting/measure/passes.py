"""One counted pass of a model: what ran, and what of it the options ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from rankbits.accounting.measure.adapters import Learned, adapter_parameters, run_adapters
from rankbits.accounting.measure.inputs import INDEPENDENT, Feed
from rankbits.accounting.measure.places import Places
from rankbits.accounting.measure.provenance import Mark, Provenance, tensors_in
from rankbits.accounting.measure.recorder import Recorder
from rankbits.errors import ModelError
from rankbits.records import CountOptions, ElementWork, Product

FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What a model raises that cannot run with the inputs it is given."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass did.

    Args:
        products: all products, in running order.
        elements: all other work.
        heads: indices of the products of a language-model head.
        constants: indices of products that a cache could hold, because their whole layer saw no input.
    """

    products: list[Product]
    elements: list[ElementWork]
    heads: set[int]
    constants: set[int]

    def asked(self, options: CountOptions) -> list[Product]:
        """The products that the options ask for."""
        rows, found = options.batch * options.query_len, []
        for index, product in enumerate(self.products):
            is_head = index in self.heads
            if (is_head and options.head == "out") or (index in self.constants and options.positions == "cached"):
                continue
            only_last = is_head and options.head == "last" and product.m == rows
            found.append(product.model_copy(update={"m": options.batch}) if only_last else product)
        return found


def count_pass(root: nn.Module, state: Learned, feeds: Iterable[Feed], *, adapters: bool) -> Pass:
    """Run a model once and count; to be called where the model is put back afterwards.

    Args:
        root: the model.
        state: what its adapters have learned.
        feeds: ways to call it; the next is tried where one asks for values on the meta device.
        adapters: whether active adapters run.

    Raises:
        ModelError: it cannot run, or runs what cannot be counted.
    """
    run_adapters(root, enabled=adapters)
    problem: Exception | None = None
    for feed in feeds:
        try:
            return _watched(root, state, feed)
        except FAILURES as error:
            problem = error
            if "meta tensor" not in str(error):
                break
    raise ModelError(
        f"{type(root).__name__} could not run with the inputs it was given ({type(problem).__name__}: {problem}); "
        "expected sizes that suit it, or inputs={name: tensor} with what its forward takes"
    ) from problem


def _watched(root: nn.Module, state: Learned, feed: Feed) -> Pass:
    provenance = _marked(root)
    places = Places(root, provenance, state.bits)
    recorder = Recorder(places, provenance, state.ranks)
    with places.followed(), recorder:
        arguments = feed.arguments
        if feed.prefill is not None:
            recorder.paused = True
            arguments = feed.after(_call(root, provenance, feed.prefill))
            recorder.finish_opaque()
            recorder.paused = False
        _call(root, provenance, arguments)
        recorder.finish_opaque()
    return Pass(recorder.products(), recorder.elements(), recorder.heads, recorder.cacheable)


def _call(root: Callable[..., Any], provenance: Provenance, arguments: Mapping[str, Any]) -> Any:
    for name, value in arguments.items():
        if name not in INDEPENDENT and name not in {"past_key_values", "encoder_outputs"}:
            for tensor in tensors_in(value):
                provenance.put(tensor, Mark(tainted=True))
    return root(**arguments)


def _marked(root: nn.Module) -> Provenance:
    """What is known before a pass: which tensors are parameters, and of what."""
    provenance, adapters = Provenance(), adapter_parameters(root)
    for name, parameter in root.named_parameters():
        operand = adapters[id(parameter)][0] if id(parameter) in adapters else "W0"
        provenance.add_parameter(parameter, Mark(operand, weight=name))
    return provenance
