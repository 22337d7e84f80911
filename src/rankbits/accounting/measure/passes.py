"""One counted pass of a model: what ran, and what of it the options ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from rankbits.accounting.measure.adapters import Learned, adapter_parameters, run_adapters
from rankbits.accounting.measure.inputs import INDEPENDENT, Feed
from rankbits.accounting.measure.places import Places
from rankbits.accounting.measure.provenance import WIDEST, Mark, Provenance, tensors_in
from rankbits.accounting.measure.recorder import Recorder
from rankbits.accounting.measure.work import WorkSums
from rankbits.errors import ModelError
from rankbits.records import CountOptions, ElementWork, Product

FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What a model raises that cannot run with the inputs it is given."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass did.

    Args:
        model: name of what ran, for messages.
        products: all products, in running order.
        work: all other work.
        heads: indices of the products of a language-model head.
        constants: indices of products that a cache could hold, because their whole layer saw no input.
    """

    model: str
    products: list[Product]
    work: WorkSums
    heads: set[int]
    constants: set[int]

    def asked(self, options: CountOptions) -> list[Product]:
        """The products that the options ask for."""
        found = []
        for index, product in enumerate(self.products):
            is_head = index in self.heads
            if (is_head and options.head == "out") or (index in self.constants and options.positions == "cached"):
                continue
            only_last = is_head and options.head == "last" and not product.constant
            found.append(_at_last_positions(product, options.batch) if only_last else product)
        return found

    def elements(self, options: CountOptions) -> list[ElementWork]:
        """The other work that the options ask for."""
        return self.work.asked(options, self._head_rows())

    def head(self, options: CountOptions, wanted: str | None) -> str:
        """Positions of the head that are counted: out, last or all.

        Args:
            options: sizes that were counted.
            wanted: what the user asked for; None is what ran.

        Raises:
            ModelError: there is no head, or it ran on other positions than those that are wanted.
        """
        rows, every = self._head_rows(), options.batch * options.query_len
        if not rows and wanted in {"last", "all"}:
            raise ModelError(
                f"head: given {wanted!r}, but {self.model} has no language-model head that ran; expected 'out' or none"
            )
        if not rows or wanted in {"out", "last"}:
            return wanted or "out"
        if rows >= every:
            return "all"
        if wanted is None and rows == options.batch:
            return "last"
        raise ModelError(
            f"head: given {wanted!r}, but it ran on {rows} of {every} positions; expected 'last', 'out', or inputs "
            "that ask for all"
        )

    def _head_rows(self) -> int:
        """Positions of all sequences that the head ran on, 0 if there is none."""
        heads = [self.products[index] for index in self.heads]
        return max((product.batch * product.m for product in heads if not product.constant), default=0)


def _at_last_positions(product: Product, batch: int) -> Product:
    rows = product.batch * product.m
    if rows % batch:
        raise ModelError(
            f"head: given 'last', but {product.module} ran on {rows} positions, expected a multiple of batch, {batch}"
        )
    return product.model_copy(update={"batch": 1, "m": batch})


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
    provenance = _marked(root, state)
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
    return Pass(type(root).__name__, recorder.products(), recorder.work, recorder.heads, recorder.cacheable)


def _call(root: Callable[..., Any], provenance: Provenance, arguments: Mapping[str, Any]) -> Any:
    for name, value in arguments.items():
        if name not in INDEPENDENT and name not in {"past_key_values", "encoder_outputs"}:
            for tensor in tensors_in(value):
                provenance.put(tensor, Mark(tainted=True))
    return root(**arguments)


def _marked(root: nn.Module, state: Learned) -> Provenance:
    """What is known before a pass: which tensors are parameters, of what, and which of them lie on a grid."""
    provenance, adapters = Provenance(), adapter_parameters(root)
    for name, parameter in root.named_parameters():
        operand = adapters[id(parameter)][0] if id(parameter) in adapters else "W0"
        bits = state.weights.get(id(parameter), WIDEST)
        provenance.add_parameter(parameter, Mark(operand, bits, weight=name))
    return provenance
