"""What a run will take, worked out before anything is loaded: parameters, memory, bit operations, disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rankbits.accounting.artefacts import artefact_bytes, checkpoint_bytes, saved_dtype
from rankbits.accounting.budget import Expectation, expectation
from rankbits.accounting.memory import MemoryEstimate, inference_memory, training_memory
from rankbits.accounting.methods import can_merge
from rankbits.accounting.params import ParameterCount, base_parameters, count
from rankbits.accounting.predict import predict
from rankbits.recipes.question import Question
from rankbits.records import CostRecord
from rankbits.records.costs import REFERENCES


@dataclass(frozen=True)
class Estimate:
    """The answer to a question.

    Args:
        question: what was asked.
        base_parameters: of the model with its head.
        counts: what is trained, by group.
        effective: parameters that run after training, merged if the method has such a form and beside the base if not.
        training: bytes at the peak of training, by part.
        inference: bytes of one forward pass without gradients, by part.
        merged: cost of a pass with the adapters in the weights; None if the method has no such form.
        unmerged: cost of a pass with the adapters beside the weights.
        artefacts: bytes on disk of what a run leaves: its weights before hardening, which drops gates and closed ranks,
            and a checkpoint to resume from.
        expected: what the budget means, if there is one.
    """

    question: Question
    base_parameters: int
    counts: ParameterCount
    effective: dict[str, int]
    training: MemoryEstimate
    inference: MemoryEstimate
    merged: CostRecord | None
    unmerged: CostRecord
    artefacts: dict[str, int]
    expected: Expectation | None


def estimate(question: Question) -> Estimate:
    """Answer a question from formulas alone.

    Raises:
        ModelError: targets, ranks or lengths do not suit the model.
        RecipeError: the budget cannot be met; what can be is in the message.
    """
    shape, spec, settings = question.shape, question.spec, question.settings
    beside = question.options.model_copy(update={"adapters": "unmerged"})
    unmerged = predict(shape, beside, spec)
    merged = predict(shape, question.options, spec) if can_merge(spec.method) else None
    base = base_parameters(shape)
    return Estimate(
        question=question,
        base_parameters=base,
        counts=count(shape, spec),
        effective=_effective(base, unmerged, merged),
        training=training_memory(shape, spec, settings),
        inference=inference_memory(shape, spec, settings),
        merged=merged,
        unmerged=unmerged,
        artefacts={
            "weights": artefact_bytes(shape, spec, dtype=saved_dtype(settings)),
            "checkpoint": checkpoint_bytes(shape, spec, settings),
        },
        expected=expectation(shape, spec, beside, question.budget) if question.budget else None,
    )


def _effective(base: int, unmerged: CostRecord, merged: CostRecord | None) -> dict[str, int]:
    # Ranges scale what runs, as the scale of a packed weight does; they are bytes and no parameters of the model.
    kept = [weight for weight in unmerged.weights if weight.adapter is not None and weight.operand != "ranges"]
    added = sum(weight.elements for weight in kept)
    return {"unmerged": base + added} | ({"merged": base} if merged is not None else {})


def as_json(answer: Estimate) -> dict[str, Any]:
    """The whole answer as plain JSON values; memory and files in bytes, budgets as they were given."""
    question = answer.question
    costs = {"merged": answer.merged, "unmerged": answer.unmerged}
    return {
        "asked": question.title,
        "model": {"name": question.shape.name, "type": question.shape.model_type, "parameters": answer.base_parameters},
        "method": question.spec.method.value,
        "settings": asdict(question.settings),
        "parameters": {**asdict(answer.counts), "trainable": answer.counts.trainable, "effective": answer.effective},
        "training_bytes": {**answer.training.items, "total": answer.training.total},
        "inference_bytes": {**answer.inference.items, "total": answer.inference.total},
        "artefact_bytes": answer.artefacts,
        "costs": {form: totals_as_json(cost) for form, cost in costs.items() if cost is not None},
        "budget": None if question.budget is None else asdict(question.budget),
        "expected": None if answer.expected is None else asdict(answer.expected),
    }


def totals_as_json(cost: CostRecord) -> dict[str, Any]:
    """What one forward pass costs in all, with its conditions, as plain JSON values."""
    percents = {f"percent_of_{bits}_bit_base": cost.percent(bits) for bits in REFERENCES}
    percents |= {f"executable_percent_of_{bits}_bit_base": cost.percent(bits, executable=True) for bits in REFERENCES}
    return {
        "options": cost.options.model_dump(mode="json"),
        "products": cost.counted(),
        "macs": cost.macs,
        "reference_macs": cost.reference_macs,
        "bops": cost.bops,
        "executable_bops": cost.executable_bops,
        "integer_share": cost.integer_share,
        "element_operations": cost.element_operations,
        "weight_bytes": cost.weight_bytes,
        **percents,
    }
