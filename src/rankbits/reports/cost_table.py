"""The costs of one forward pass as plain text of 80 columns, for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from rankbits.records import CostRecord, Product
from rankbits.records.costs import REFERENCES
from rankbits.reports.costs import (
    breakdown,
    module_kind,
    options_text,
    percent_text,
    products_text,
    si,
)

WIDTH = 80
_NAME = 26


def cost_table(costs: CostRecord) -> str:
    """What was counted and how, totals with both references, and the parts by product and by kind of module."""
    parts = [
        [*_wrapped("counted", options_text(costs.options)), *_wrapped("products", products_text(costs))],
        _totals(costs),
        _parts(costs, "product", lambda product: product.op),
        _parts(costs, "module", module_kind),
        _besides(costs),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{name:<11}", subsequent_indent=" " * 11)


def _totals(costs: CostRecord) -> list[str]:
    """Absolute numbers, and bit operations in percent of the merged base model."""
    heads = "".join(f"{f'% of {bits}-bit base':>18}" for bits in REFERENCES)
    lines = [f"{'':<17}{'total':>26}{heads}"]
    rows = [("MACs", costs.macs, None), ("nominal BOPs", costs.bops, False)]
    rows += [("executable BOPs", costs.executable_bops, True)]
    for name, number, executable in rows:
        shares = [] if executable is None else [costs.percent(bits, executable=executable) for bits in REFERENCES]
        lines.append(f"{name:<17}{number:>26,}" + "".join(f"{percent_text(share):>18}" for share in shares))
    base = [("base MACs", costs.reference_macs)]
    base += [(f"base at {bits} bits", costs.reference_bops(bits)) for bits in REFERENCES]
    lines += [f"{name:<17}{number:>26,}" for name, number in base]
    return [*lines, f"The base is the merged model. {costs.integer_share:.1%} of the MACs can run in integer kernels."]


def _parts(costs: CostRecord, title: str, key: Callable[[Product], str]) -> list[str]:
    if not costs.products:
        return []
    lines = [
        f"{'by ' + title:<{_NAME}}{'number':>7}{'MACs':>10}{'share':>8}{'nominal':>10}{'executable':>11}{'integer':>8}"
    ]
    for part in breakdown(costs, key):
        # A name longer than its column keeps a line of its own, and nothing of it is cut.
        name = [part.name, f"{'':<{_NAME}}"] if len(part.name) >= _NAME else [f"{part.name:<{_NAME}}"]
        share, integer = part.macs / costs.macs, part.integer_macs / part.macs
        numbers = f"{part.products:>7}{si(part.macs):>10}{share:>8.1%}{si(part.bops):>10}{si(part.executable_bops):>11}"
        lines += [*name[:-1], f"{name[-1]}{numbers}{integer:>8.1%}"]
    return lines


def _besides(costs: CostRecord) -> list[str]:
    """What is no product: element operations and bytes."""
    lines = []
    if costs.elements:
        lines.append(f"{'element operations':<24}{costs.element_operations:>19,}")
    if costs.weights:
        lines.append(f"{'bytes of weights, packed':<24}{costs.weight_bytes:>19,}")
        means = [("by numbers", costs.mean_bits_by_parameters()), ("by MACs", costs.mean_weight_bits_by_macs())]
        lines += [f"{'mean bits ' + name:<24}{mean:>19.2f}" for name, mean in means if mean is not None]
    return lines
