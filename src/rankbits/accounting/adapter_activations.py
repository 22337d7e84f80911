"""What the adapter of one linear layer keeps for the backward pass, and what it writes besides."""

from __future__ import annotations

from rankbits.accounting.ledger import Ledger
from rankbits.accounting.methods import (
    FIXED_DOWN,
    FIXED_UP,
    LOW_RANK,
    WITH_MAGNITUDE,
)
from rankbits.accounting.mora import ROTATION, mora_blocks, mora_kind, mora_side
from rankbits.accounting.quantizers import GATES_PER_QUANTIZER, HEAD_SITES, Owned, ranges
from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.spec import Linear, Method, MethodSpec

FLOAT = 4
INDEX_BYTES = 8
EAGER_COPIES = 3
"""Tensors of a quantizer's size that its unfused arithmetic leaves as temporaries besides its result: fitted to
measured runs, not derived. It writes many more, most of which seem to be used again."""


def keep_adapter(
    ledger: Ledger,
    linear: Linear,
    spec: MethodSpec,
    own: Owned,
    rows: int,
    settings: TrainingSettings,
    *,
    carries: bool,
) -> None:
    """Enter one adapter into the ledger; its input is entered by the caller.

    Args:
        ledger: where.
        linear: the adapted layer.
        spec: the method.
        own: which quantizers are this layer's own.
        rows: rows of this call.
        settings: width of an element, and whether quantizers are fused.
        carries: whether the layer's input carries a gradient, which then needs the weights that made the output.
    """
    width = settings.activation_bytes
    hidden, output = rows * spec.rank * width, rows * linear.d_out * width
    if settings.half_throughout:
        ledger.keep(rows * linear.d_in * FLOAT)
        ledger.write(rows * linear.d_in * FLOAT)
    if spec.method is Method.BAYESIAN_LORA:
        _keep_bayesian(ledger, linear, spec, own, rows, settings, carries=carries)
    elif spec.method is Method.MORA:
        squeezed = mora_blocks(linear, spec) * mora_side(linear, spec) * width
        ledger.keep(rows * squeezed)
        if carries and mora_kind(spec) == ROTATION:
            ledger.keep(squeezed)  # sines and cosines, through which the input's gradient goes back
        ledger.write(rows * squeezed, rows * squeezed, output, output)
    elif spec.method in FIXED_UP:
        ledger.write(hidden, hidden, output)
    elif spec.method in LOW_RANK or spec.method in FIXED_DOWN:
        # x A^T; then B, its scaling and the sum with the base.
        ledger.keep(hidden)
        ledger.write(hidden, output, output, output)
    if spec.method in WITH_MAGNITUDE:
        # The base's output and the update are both scaled by the trained magnitude.
        ledger.keep(output, output)
        ledger.write(output, output, linear.d_in * linear.d_out * FLOAT)


def keep_head(ledger: Ledger, linear: Linear, spec: MethodSpec, rows: int, settings: TrainingSettings) -> None:
    """Enter the quantizers of a linear layer that is trained in full; its input is entered by the caller.

    The quantizer of the input keeps what goes in, the product what comes out of both.
    """
    width, sites = settings.activation_bytes, HEAD_SITES
    x, weight = rows * linear.d_in * width, linear.d_in * linear.d_out * width
    copies = 1 if settings.compiled else 1 + EAGER_COPIES
    gates = len(sites) * GATES_PER_QUANTIZER * FLOAT
    ledger.keep(*[gates] * 4, FLOAT * sum(ranges(linear, site, spec) for site in sites))
    ledger.keep(x, weight)
    ledger.write(*[x] * copies)
    ledger.write(*[weight] * copies)


def _keep_bayesian(
    ledger: Ledger,
    linear: Linear,
    spec: MethodSpec,
    own: Owned,
    rows: int,
    settings: TrainingSettings,
    *,
    carries: bool,
) -> None:
    """A quantizer keeps what goes in; what comes out is kept by the product that reads it (Bayesian-LoRA, Alg. 1)."""
    width, sites = settings.activation_bytes, set(own.quantizers)
    output, weight = rows * linear.d_out * width, linear.d_in * linear.d_out * width
    copies = 1 if settings.compiled else 1 + EAGER_COPIES
    ledger.keep(*_gate_bytes(linear, spec, own))
    if "input" in sites:
        ledger.keep(rows * linear.d_in * width)
        ledger.write(*[rows * linear.d_in * width] * copies)
    if "weight" in sites:
        ledger.keep(weight if carries else 0)
        ledger.write(*[weight] * copies)
    if "output" in sites:
        ledger.keep(output)
        ledger.write(*[output] * copies)
    if "weight" in sites and spec.weight_gradient_rows is not None and spec.weight_gradient_rows < rows:
        _keep_some_rows(ledger, linear, spec, rows, width)
    if spec.rounds_sum:
        _keep_sum(ledger, linear, spec)
        ledger.write(output)
    else:
        _keep_beside(ledger, linear, spec, rows, width, carries=carries)


def _keep_sum(ledger: Ledger, linear: Linear, spec: MethodSpec) -> None:
    """The sum that is rounded, in fp32, and B diag(E g) for the gradient of A.

    Factors that learn row by row need the latter as little as LoRA's do: from them E, scaled, is kept.
    """
    weight, scaled = linear.d_in * linear.d_out * FLOAT, linear.d_out * spec.rank * FLOAT
    if spec.weight_gradient_rows is not None:
        # Where ranks are learned the product of E and gates is counted with these.
        scaled = 0 if spec.learn_rank and spec.rank > 1 else spec.rank * FLOAT
    ledger.write(scaled, weight, weight, weight)
    ledger.keep(weight, scaled)


def _keep_some_rows(ledger: Ledger, linear: Linear, spec: MethodSpec, rows: int, width: int) -> None:
    """The permutation that begins with the rows for the gradient of the weight; beside an update a copy of these.

    The factors of a sum keep the whole input anyway.
    """
    chosen = spec.weight_gradient_rows or 0
    ledger.keep(rows * INDEX_BYTES, 0 if spec.rounds_sum else chosen * linear.d_in * width)


def _keep_beside(ledger: Ledger, linear: Linear, spec: MethodSpec, rows: int, width: int, *, carries: bool) -> None:
    """The factors of the update where a gradient needs them, and what runs between them."""
    rank, sites = spec.rank, set(spec.sites)
    hidden, output = rows * rank * width, rows * linear.d_out * width
    ledger.write(hidden, hidden, output, output, output)
    if "down" in sites:
        ledger.keep(rank * linear.d_in * width if carries else 0)
    if "up" in sites:
        ledger.keep(linear.d_out * rank * width)
    # Both operands of h diag(E g), and h E g itself; a quantizer between two products makes one tensor more.
    ledger.keep(hidden, hidden, *([hidden] * len(sites & {"down_output", "diagonal_output"})))


def _gate_bytes(linear: Linear, spec: MethodSpec, own: Owned) -> list[int]:
    """Samples of the width gates with their chains, and ranges; rank gates and their chain; E, and E with its gates."""
    rank, sites = spec.rank, own.quantizers
    # A tied width is sampled for each layer anew; a shared input is quantized, and its width sampled, once.
    gates = len(sites) * GATES_PER_QUANTIZER * FLOAT
    kept = [gates] * 4 + [FLOAT * sum(ranges(linear, site, spec) for site in sites)]
    # What an attention rounds is drawn there once more: it does not know what the layer drew.
    kept += [len(own.attended) * GATES_PER_QUANTIZER * FLOAT] * 3
    if "diagonal" in sites:
        kept.append(rank * FLOAT)
    if spec.learn_rank and rank > 1:
        kept += [(rank - 1) * FLOAT] * 2 + [rank * FLOAT] * 2
    return kept
