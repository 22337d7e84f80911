"""What the adapter of one linear layer keeps for the backward pass, and what it writes besides."""

from __future__ import annotations

from rankbits.accounting.ledger import Ledger
from rankbits.accounting.methods import FIXED_DOWN, FIXED_UP, LOW_RANK, WITH_MAGNITUDE, mora_side
from rankbits.accounting.params import GATES_PER_QUANTIZER
from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.spec import Linear, Method, MethodSpec

FLOAT = 4
EAGER_COPIES = 3
"""Tensors of a quantizer's size that its unfused arithmetic leaves as temporaries besides its result: fitted to
measured runs, not derived. It writes many more, most of which seem to be used again."""


def keep_adapter(
    ledger: Ledger, linear: Linear, spec: MethodSpec, rows: int, settings: TrainingSettings, *, carries: bool
) -> None:
    """Enter one adapter into the ledger; its input is entered by the caller.

    Args:
        ledger: where.
        linear: the adapted layer.
        spec: the method.
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
        _keep_bayesian(ledger, linear, spec, rows, settings, carries=carries)
    elif spec.method is Method.MORA:
        side = rows * mora_side(linear, spec.rank) * width
        ledger.keep(side)
        ledger.write(side, side, output, output)
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


def _keep_bayesian(
    ledger: Ledger, linear: Linear, spec: MethodSpec, rows: int, settings: TrainingSettings, *, carries: bool
) -> None:
    """A quantizer keeps what goes in; what comes out is kept by the product that reads it (Bayesian-LoRA, Alg. 1)."""
    width, rank, sites = settings.activation_bytes, spec.rank, set(spec.sites)
    hidden, output = rows * rank * width, rows * linear.d_out * width
    weight = linear.d_in * linear.d_out * width
    copies = 1 if settings.compiled else 1 + EAGER_COPIES
    ledger.write(hidden, hidden, output, output, output)
    ledger.keep(*_gate_bytes(spec))
    if "input" in sites:
        ledger.keep(rows * linear.d_in * width)
        ledger.write(*[rows * linear.d_in * width] * copies)
    if "weight" in sites:
        ledger.keep(weight if carries else 0)
        ledger.write(*[weight] * copies)
    if "down" in sites:
        ledger.keep(rank * linear.d_in * width if carries else 0)
    if "up" in sites:
        ledger.keep(linear.d_out * rank * width)
    # Both operands of h diag(E g), and h E g itself; a quantizer between two products makes one tensor more.
    ledger.keep(hidden, hidden, *([hidden] * len(sites & {"down_output", "diagonal_output"})))
    if "output" in sites:
        ledger.keep(output)
        ledger.write(*[output] * copies)


def _gate_bytes(spec: MethodSpec) -> list[int]:
    """Samples of the width gates with their chains, and ranges; rank gates and their chain; E, and E with its gates."""
    rank, sites = spec.rank, len(spec.sites)
    gates = sites * GATES_PER_QUANTIZER * FLOAT
    kept = [gates] * 4 + [sites * FLOAT]
    if "diagonal" in spec.sites:
        kept.append(rank * FLOAT)
    if spec.learn_rank and rank > 1:
        kept += [(rank - 1) * FLOAT] * 2 + [rank * FLOAT] * 2
    return kept
