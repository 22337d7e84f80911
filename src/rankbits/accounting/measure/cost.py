"""`cost`: what one forward pass of a live model costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from rankbits.accounting.measure.adapters import Learned, bare, base_of, has_adapters, learned, why_unmergeable
from rankbits.accounting.measure.asked import asked
from rankbits.accounting.measure.inputs import Feed, feeds
from rankbits.accounting.measure.passes import count_pass
from rankbits.accounting.measure.untouched import untouched
from rankbits.accounting.measure.weights import weight_records
from rankbits.errors import ModelError
from rankbits.records import CostRecord

FORMS = ("merged", "unmerged")


def cost(
    model: nn.Module,
    *,
    sequence_length: int | None = None,
    batch: int = 1,
    adapters: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    **options: Any,
) -> CostRecord:
    """Matrix products, element operations and weights of one forward pass, counted on the live model.

    The model runs in eval mode with the gates of inference, without its adapters for the reference and with them if
    they are not merged; afterwards it is as it was, to the bit. What runs is what is counted: each product that torch
    dispatches below autograd is one record, with the widths that quantizers give and 32 where nothing is known (16
    for operands held in half precision). Layers that multiply more ranks than they keep are counted at the rank they
    keep. MACs are batch x m x k x n; bit operations, MACs times both widths, follow van Baalen et al. 2020.

    With positions="cached" those products drop out that do not depend on the input, such as DeBERTa's position rows
    (He et al. 2021). The products of DoRA's weight norm do not depend on it either, but PEFT runs them at each call,
    so they stay.

    Args:
        model: any torch module; PEFT models and compiled ones are unwrapped.
        sequence_length: tokens per sequence; sets query_len and key_len, and source_len where there are two stacks.
        batch: sequences.
        adapters: "merged" or "unmerged"; None is merged where that is exact and keeps all widths, else unmerged.
        inputs: what `forward` takes, by name, for models that do not take token ids alone. Batch and length are those
            of the first [batch, tokens] integers among them; where there are none, `sequence_length` is needed and
            only printed.
        options: further fields of `CountOptions`: query_len, key_len (larger than query_len: a step of a decoder with
            a cache), source_len, positions, head, embeddings, float_bits, int4. A language-model head is counted
            on all positions where the model has one, unless `head` says otherwise.

    Raises:
        ModelError: `model` is no module, sizes do not suit it, it cannot run, or it runs an operation that cannot be
            counted. The message names what was given and expected.
    """
    root = bare(model)
    base = base_of(root)
    settings = asked(base, sequence_length, batch, inputs, options)
    settings = settings.model_copy(update={"adapters": _form(root, adapters)})

    def calls() -> Iterable[Feed]:
        return feeds(base, settings) if inputs is None else [Feed(dict(inputs))]

    with untouched(root):
        state = learned(root)
        beside = settings.adapters == "unmerged" and has_adapters(root)
        adapted = count_pass(root, state, calls(), adapters=True) if beside else None
        reference = count_pass(base, Learned(), calls(), adapters=False)
        counted = adapted or reference
    if options.get("head") is None:
        settings = settings.model_copy(update={"head": "all" if counted.heads else "out"})
    return CostRecord(
        options=settings,
        products=counted.asked(settings),
        reference_macs=sum(product.macs for product in reference.asked(settings)),
        elements=counted.elements,
        weights=weight_records(root, state, settings),
    )


def _form(root: nn.Module, wanted: str | None) -> str:
    """Whether adapters are counted merged or unmerged."""
    if wanted is None:
        return "merged" if why_unmergeable(root, exact=True) is None else "unmerged"
    if wanted not in FORMS:
        raise ModelError(f"adapters: given {wanted!r}, expected one of {', '.join(FORMS)} or None")
    reason = why_unmergeable(root, exact=False) if wanted == "merged" else None
    if reason is not None:
        raise ModelError(f"adapters: given 'merged', but the adapters cannot be: {reason}; expected 'unmerged'")
    return wanted
