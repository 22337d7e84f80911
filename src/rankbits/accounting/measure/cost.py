"""`cost`: what one forward pass of a live model costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from rankbits.accounting.measure.adapters import (
    Learned,
    bare,
    base_of,
    forget_results,
    has_adapters,
    learned,
    treat_as_merged,
    why_unmergeable,
)
from rankbits.accounting.measure.asked import asked
from rankbits.accounting.measure.given import copied
from rankbits.accounting.measure.inputs import Feed, feeds
from rankbits.accounting.measure.passes import count_pass
from rankbits.accounting.measure.untouched import untouched
from rankbits.accounting.measure.weights import refuse_wide, weight_records
from rankbits.errors import ModelError
from rankbits.records import CostRecord

FORMS = ("merged", "unmerged")


def cost(
    model: nn.Module,
    *,
    sequence_length: int | None = None,
    batch: int | None = None,
    adapters: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    **options: Any,
) -> CostRecord:
    """Matrix products, element operations and weights of one forward pass, counted on the live model.

    The model runs in eval mode with the gates of inference, without its adapters for the reference and with them if
    they are not merged. Layers whose quantizer rounds the sum of weight and update run as they do once merged, with
    the widths of that sum and of their inputs, unless they are asked for unmerged: then the product that forms the
    update is counted too. Afterwards the model is as it was, to the bit.

    What runs is what is counted: each product that torch dispatches below autograd is one record, with the widths that
    quantizers give and 32 where nothing is known (16 for operands held in half precision). Layers that multiply more
    ranks than they keep are counted at the rank they keep. MACs are batch x m x k x n; bit operations, MACs times both
    widths, follow van Baalen et al. 2020.

    With positions="cached" those products drop out that do not depend on the input, such as DeBERTa's position rows
    (He et al. 2021). The products of DoRA's weight norm do not depend on it either, but PEFT runs them at each call,
    so they stay.

    Element operations are the elements that the executed operations of torch write outside matrix products, those of a
    learning adapter's fake quantization included; estimates from a config list one entry per step instead, so the two
    differ. What does not depend on the input (masks and rotations too) drops out of them with positions="cached".

    Args:
        model: any torch module; PEFT models and compiled ones are unwrapped.
        sequence_length: tokens per sequence; sets query_len and key_len, and source_len where there are two stacks.
        batch: sequences; 1 if neither this nor inputs say otherwise.
        adapters: "merged" or "unmerged"; None is merged where that is exact and keeps all widths, else unmerged.
        inputs: what `forward` takes, by name, for models that do not take token ids alone. Sizes are those of the ids
            or embeddings among them, of the cache, and of the encoder's where there are two stacks, else of the first
            [batch, tokens] integers; sizes given beside them must agree. Where there are none, `sequence_length` is
            needed and only printed. They are copied for each pass, so that a cache stays as it was.
        options: further fields of `CountOptions`: query_len, key_len (larger than query_len: a step of a decoder with
            a cache), source_len, positions, head, embeddings, float_bits, int4. A language-model head is counted
            on the positions it runs on (all, unless inputs ask it for the last), if `head` does not say otherwise.

    Raises:
        ModelError: `model` is no module, or one of float64; sizes do not suit it or its inputs, it has no head that
            was asked for, it cannot run, or it runs an operation or adapter that cannot be counted. The message names
            what was given and expected.
    """
    root = bare(model)
    refuse_wide(root)
    base = base_of(root)
    settings = asked(base, sequence_length, batch, inputs, options)
    settings = settings.model_copy(update={"adapters": _form(root, adapters)})

    def calls() -> Iterable[Feed]:
        return feeds(base, settings) if inputs is None else [Feed(copied(inputs))]

    with untouched(root):
        forget_results(root)
        if settings.adapters == "merged":
            treat_as_merged(root)
        state = learned(root)
        beside = settings.adapters == "unmerged" and has_adapters(root)
        adapted = count_pass(root, state, calls(), adapters=beside) if beside or state.weights or state.heads else None
        reference = count_pass(base, Learned(), calls(), adapters=False)
        counted = adapted or reference
    settings = settings.model_copy(update={"head": counted.head(settings, options.get("head"))})
    return CostRecord(
        options=settings,
        products=counted.asked(settings),
        reference_macs=sum(product.macs for product in reference.asked(settings)),
        elements=counted.elements(settings),
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
