"""The tensors that inference keeps, with the widths they can be packed in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from rankbits.accounting.measure.adapters import Learned, adapter_parameters, rounds_sum
from rankbits.accounting.measure.places import base_name
from rankbits.accounting.measure.provenance import WIDEST, dtype_bits
from rankbits.accounting.measure.quantized import opaque_weight_bits, scale_count
from rankbits.errors import ModelError
from rankbits.records import CountOptions, WeightRecord
from rankbits.records.costs import Width
from rankbits.tuners.bayesian_lora import BayesianLoraLinear, LayerSummary, QuantizedHeadLinear
from rankbits.tuners.bayesian_lora.config import ACTIVATION_SITES, Site

_TRAINING_ONLY = frozenset({"ranknum"})
"""Names of parameters, or of what holds one for each adapter, that inference does not read."""
VIRTUAL_TOKENS = "prompt_encoder."
"""Where PEFT keeps prompts and prefixes."""


def weight_records(root: nn.Module, learned: Learned, options: CountOptions) -> list[WeightRecord]:
    """Every tensor of inference once: tied ones under their first name, trained copies in place of their originals.

    Args:
        root: the model.
        learned: what its adapters have learned.
        options: merged adapters leave nothing but their layer's weight, which lies on no grid unless it is a rounded
            sum, and ranges of activations around it; look-up tables are listed only with embeddings "in", but a head
            that shares one's weight needs it even without.
    """
    merged = options.adapters == "merged"
    narrow = _narrow_weights(root, learned, merged=merged)
    adapters, unused = adapter_parameters(root), _unused(root)
    elsewhere = _tied_tables(root) if options.embeddings == "out" else set()
    found: list[WeightRecord] = []
    for name, module in root.named_modules():
        for last, parameter in module.named_parameters(recurse=False):
            if id(parameter) in unused or {last, name.rpartition(".")[2]} & _TRAINING_ONLY:
                continue
            if id(parameter) in elsewhere and isinstance(module, nn.Embedding):
                continue
            unused.add(id(parameter))
            if name.startswith(VIRTUAL_TOKENS):
                found += [] if merged else [_virtual_tokens(name, parameter)]
            elif id(parameter) not in adapters:
                found.append(_base_record(name, module, last, narrow.get(id(parameter))))
            elif adapters[id(parameter)][2] and not merged:
                found.append(_adapter_record(root, name, parameter, adapters[id(parameter)]))
    for (name, adapter), entry in learned.layers.items():
        layer = _bayesian(root, name)
        if not (merged or layer.merged):
            found += _factor_records(layer, base_name(name), adapter, entry)
        found += _range_records(layer, base_name(name), adapter, merged=merged or layer.merged)
    found += _input_ranges(root, learned)
    return [record for record in found if record.operand != "table" or options.embeddings == "in"]


def refuse_wide(root: nn.Module) -> None:
    """Raise ModelError for weights of more than 32 bits, which a record has no width for."""
    for name, parameter in root.named_parameters():
        if parameter.dtype in (torch.float64, torch.complex64, torch.complex128):
            raise ModelError(
                f"{name}: held in {parameter.dtype}, expected at most 32 bits: cast the model to float32 first"
            )


def _tied_tables(root: nn.Module) -> set[int]:
    """Identities of look-up tables that are the weight of another layer too."""
    tables: set[int] = set()
    others: set[int] = set()
    for module in root.modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        (tables if isinstance(module, nn.Embedding) else others).update(own)
    return tables & others


def _unused(root: nn.Module) -> set[int]:
    """Parameters to leave out: originals and inactive copies of what PEFT trains in full, which do not run.

    Those of Bayesian-LoRA too, which are listed by what they have learned, and the gates and ranges of quantized heads.
    """
    found: set[int] = set()
    for module in root.modules():
        if isinstance(module, BayesianLoraLinear):
            base = {id(parameter) for parameter in module.get_base_layer().parameters()}
            found |= {id(parameter) for parameter in module.parameters()} - base
        if isinstance(module, QuantizedHeadLinear):
            found |= {id(parameter) for child in module.children() for parameter in child.parameters()}
        if isinstance(module, AuxiliaryTrainingWrapper) and hasattr(module, "modules_to_save"):
            active = [] if module.disable_adapters else module.active_adapters
            copies = module.modules_to_save
            running = [copies[name] for name in active if name in copies] or [module.original_module]
            keep = {id(parameter) for part in running for parameter in part.parameters()}
            found |= {id(parameter) for parameter in module.parameters()} - keep
    return found


def _bayesian(root: nn.Module, name: str) -> BayesianLoraLinear:
    layer = root.get_submodule(name)
    assert isinstance(layer, BayesianLoraLinear)
    return layer


def _head(root: nn.Module, name: str) -> QuantizedHeadLinear:
    layer = root.get_submodule(name)
    assert isinstance(layer, QuantizedHeadLinear)
    return layer


def _narrow_weights(root: nn.Module, learned: Learned, *, merged: bool) -> dict[int, dict[str, int]]:
    """Width of base weights on a grid, and number and width of their scales, by their identity.

    Beside an update that is rounded by itself W0 does; a sum does once it is merged.
    """
    found = {}
    for (name, adapter), entry in learned.layers.items():
        layer = _bayesian(root, name)
        if "weight" in entry.bits and rounds_sum(layer, adapter) == (merged or layer.merged):
            quantizer = layer.quantizers_of(adapter)["weight"]
            found[id(layer.get_base_layer().weight)] = _packed(entry.bits["weight"], quantizer)
    for (name, adapter), entry in learned.heads.items():
        head = _head(root, name)
        found[id(head.weight)] = _packed(entry.bits["weight"], head.quantizers_of(adapter)["weight"])
    return found


def _packed(bits: int, quantizer: Any) -> dict[str, int]:
    return {"bits": bits, "scales": quantizer.range_count, "scale_bits": quantizer.layout.scale_bits}


def _base_record(name: str, module: nn.Module, last: str, narrow: dict[str, int] | None) -> WeightRecord:
    parameter = module._parameters[last]
    assert parameter is not None
    elements, form = parameter.numel(), {"bits": dtype_bits(parameter)}
    packed = opaque_weight_bits(module) if last == "weight" else None
    if packed is not None:
        elements = int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
        form = {"bits": packed, "scales": scale_count(module)}
    operand = _operand(module, last, parameter.dim())
    given = {"module": base_name(name), "operand": operand, "elements": elements}
    return WeightRecord.model_validate(given | (narrow or form))


def _virtual_tokens(name: str, parameter: nn.Parameter) -> WeightRecord:
    adapter = name.removeprefix(VIRTUAL_TOKENS).partition(".")[0]
    bits = cast(Width, dtype_bits(parameter))
    return WeightRecord(module=name, operand="prompt", elements=parameter.numel(), bits=bits, adapter=adapter)


def _operand(module: nn.Module, last: str, axes: int) -> str:
    if isinstance(module, nn.Embedding):
        return "table"
    own = list(module.parameters(recurse=False))
    if all(parameter.dim() == 1 for parameter in own) and hasattr(module, "weight"):
        return "norm"
    return "W0" if axes >= 2 else "bias" if last == "bias" else last


def _adapter_record(root: nn.Module, name: str, parameter: nn.Parameter, known: tuple[str, str, bool]) -> WeightRecord:
    operand, adapter, _ = known
    parts = name.split(".")
    owners = (".".join(parts[:size]) for size in range(len(parts), -1, -1))
    owner = next(own for own in owners if isinstance(root.get_submodule(own), BaseTunerLayer))
    return WeightRecord(
        module=base_name(owner),
        operand=operand,
        elements=parameter.numel(),
        bits=cast(Width, dtype_bits(parameter)),
        adapter=adapter,
    )


def _factor_records(layer: BayesianLoraLinear, name: str, adapter: str, entry: LayerSummary) -> Iterator[WeightRecord]:
    """A, E and B at their hard rank."""
    sizes = {
        "A": ("down", entry.rank * layer.in_features),
        "E": ("diagonal", entry.rank),
        "B": ("up", entry.rank * layer.out_features),
    }
    for operand, (site, elements) in sizes.items():
        bits = entry.bits.get(site, WIDEST)
        yield WeightRecord(
            module=name,
            operand=operand,
            elements=elements,
            bits=cast(Width, bits),
            scales=int(site in entry.bits),
            adapter=adapter,
        )


def _input_ranges(root: nn.Module, learned: Learned) -> Iterator[WeightRecord]:
    """Ranges of the inputs of quantized heads, which are part of the model however adapters are counted."""
    for name, adapter in learned.heads:
        ranges = _head(root, name).quantizers_of(adapter)[Site.INPUT.value].bound_count
        yield WeightRecord(module=base_name(name), operand="ranges", elements=ranges)


def _range_records(layer: BayesianLoraLinear, name: str, adapter: str, *, merged: bool) -> Iterator[WeightRecord]:
    """Ranges that come with no packed weight: of the layer's own activations, and of a sum rounded at each call."""
    quantizers = layer.quantizers_of(adapter)
    if merged and not rounds_sum(layer, adapter):
        return
    ranges = sum(quantizers[site].bound_count for site in ACTIVATION_SITES if site.value in quantizers)
    if rounds_sum(layer, adapter) and not merged:
        ranges += quantizers["weight"].range_count
    if ranges:
        yield WeightRecord(module=name, operand="ranges", elements=ranges, adapter=None if merged else adapter)
