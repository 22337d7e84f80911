"""The facts of a finished run that its record keeps: versions, machine, parameters and what each matrix learned."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from rankbits.recipes.freezing import trained_parameters
from rankbits.records import BudgetRecord, ModuleRecord, ParameterRecord
from rankbits.training.callback import RankbitsCallback
from rankbits.tuners.bayesian_lora import LayerSummary
from rankbits.tuners.dylora import DyloraLinear
from rankbits.tuners.sbora import SboraLinear

PACKAGES = ("rankbits", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "bitsandbytes")
GATE_MARKS = ("bayesian_lora_gates", "head_gates")
RANGE_MARKS = ("bayesian_lora_quantizers", "head_quantizers")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int]:
    """The kind of machine, without its name."""
    facts: dict[str, str | int] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu_cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    return facts


def peak_memory_bytes() -> int:
    """Largest memory this process has held: on the accelerator if there is one, else resident; 0 if unknown."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        # Linux hands ru_maxrss on to the programs a process starts, so that a child would show its parent's peak.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        return _largest_resident_set()


def _largest_resident_set() -> int:
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def parameters(model: PeftModel | PreTrainedModel) -> ParameterRecord:
    """Numbers of parameters of a model in training, before hardening.

    `adapter` counts the matrices of the update (A, E, B); gates and ranges are what Bayesian-LoRA adds to them; `base`
    are weights of the model itself, where they train.
    """
    if not isinstance(model, PeftModel):
        return trained_parameters(model)
    counts = {"adapter": 0, "gates": 0, "ranges": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[_part(name)] += _numbers(parameter)
    # A module that is trained in full is there twice: trained, and as it was.
    # AdaLoRA's ranknum is a setting that PEFT keeps as a parameter.
    uncounted = (".original_module.", ".ranknum.")
    originals = sum(_numbers(p) for name, p in model.named_parameters() if any(mark in name for mark in uncounted))
    total = sum(_numbers(p) for p in model.parameters()) - originals
    return ParameterRecord(trainable=sum(counts.values()), total=total, **counts)


def _numbers(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds: bitsandbytes packs two codes of 4 bits into each byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)


def _part(name: str) -> str:
    if any(mark in name for mark in GATE_MARKS):
        return "gates"
    if any(mark in name for mark in RANGE_MARKS):
        return "ranges"
    return "head" if ".modules_to_save." in name else "adapter"


def learned(model: nn.Module, summaries: list[LayerSummary]) -> list[ModuleRecord]:
    """One entry per adapted matrix: from the gates as they were before hardening, or its fixed rank.

    Quantized matrices of heads are listed beside them. Methods whose update is no low-rank product (MoRA, bottlenecks,
    prefix, prompt) have no entries.

    Args:
        model: the model, for methods without gates.
        summaries: what `summarize` said before hardening; empty for methods without gates.
    """
    facts = [_learned(summary) for summary in summaries] or [
        {"name": name, "rank": rank, "max_rank": largest}
        for name, layer in model.named_modules()
        for rank, largest in _fixed_ranks(layer)
    ]
    return [ModuleRecord.model_validate({**fact, **_place(str(fact["name"]))}) for fact in facts]


def _fixed_ranks(layer: nn.Module) -> Iterable[tuple[int, int]]:
    """Rank and largest rank of each adapter of a layer whose update is a product of two matrices."""
    if isinstance(layer, AdaLoraLayer):
        return [(int(diagonal.count_nonzero()), layer.r[name]) for name, diagonal in layer.lora_E.items()]
    if isinstance(layer, DyloraLinear):
        return [(layer.evaluation_rank[name], largest) for name, largest in layer.r.items()]
    return [(rank, rank) for rank in layer.r.values()] if isinstance(layer, LoraLayer | SboraLinear) else []


def _learned(summary: LayerSummary) -> dict[str, object]:
    """A summary in the words of a record, in which sequences are lists and modules have their short names."""
    return asdict(summary) | {
        "bit_open_probabilities": {site: list(single) for site, single in summary.bit_open_probabilities.items()},
        "rank_open_probabilities": list(summary.rank_open_probabilities),
        "shared": {site: _short(owner) for site, owner in summary.shared.items()},
    }


def _short(name: str) -> str:
    return re.sub(r"\.modules_to_save\.[^.]+", "", name.removeprefix("base_model.model."))


def _place(name: str) -> dict[str, str | int | None]:
    """Name, block index and matrix kind of a module of a PEFT model."""
    short = _short(name)
    index = re.search(r"\.(\d+)\.", short)
    # "output.dense" says more than "dense": BERT has three of them in a block.
    tail = short[index.end() :] if index else short
    kind = tail.rsplit(".", 1)[-1]
    return {"name": short, "layer": int(index.group(1)) if index else None, "kind": tail if kind == "dense" else kind}


def budgets(callbacks: Iterable[TrainerCallback]) -> list[BudgetRecord]:
    """What a run was allowed to cost, and what its gates cost as they are now; before hardening removes them."""
    schedules = [c.schedule for c in callbacks if isinstance(c, RankbitsCallback) and c.schedule is not None]
    return [
        BudgetRecord(
            quantity=state.budget.quantity.value,
            limit=state.budget.limit,
            reference_bits=state.budget.reference_bits,
            reached=state.cost,
        )
        for schedule in schedules
        for state in schedule.budgets()
    ]
