"""Sizes on disk of what a run leaves: the safetensors file of a model or an adapter, to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from rankbits.accounting.params import count, quantized_heads, targeted, tensor_sizes
from rankbits.accounting.quantizers import GATES_PER_QUANTIZER, HEAD_SITES, Owned, owned, range_shape
from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.spec import Convolution, Linear, Method, MethodSpec, ModelShape, Norm, Part, Table
from rankbits.accounting.states import optimizer_bytes
from rankbits.accounting.trained import trained_in_full
from rankbits.accounting.weights import adapter_sizes, keeps_original, trained_sizes
from rankbits.errors import ModelError

BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "BOOL": 1}
ORDER = tuple(BYTES)
"""safetensors puts wide types first, and orders names within a type."""
PEFT_STEM = "base_model.model."
EXACT = frozenset({Method.LORA, Method.RSLORA, Method.QLORA, Method.BAYESIAN_LORA})


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * BYTES[self.dtype]


def file_bytes(entries: list[Entry]) -> int:
    """Bytes of a safetensors file: 8 for the header's length, the header (JSON, padded to 8), and the values."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in sorted(entries, key=lambda entry: (ORDER.index(entry.dtype), entry.name)):
        end = offset + entry.size_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8 + offset


def artefact_bytes(shape: ModelShape, spec: MethodSpec, *, dtype: str = "F32") -> int:
    """Bytes of the file that is saved: the adapter's, or the whole model's where the base itself is trained.

    Exact for LoRA, Bayesian-LoRA (before hardening) and whole models in one file; for other adapters the values are
    exact and names are taken to be as long as LoRA's.

    Args:
        shape: the model.
        spec: the method.
        dtype: of the weights of a whole model: F32, BF16 or F16; adapters are F32.

    Raises:
        ModelError: an unknown dtype, or targets that match nothing.
    """
    if dtype not in {"F32", "BF16", "F16"}:
        raise ModelError(f"dtype: given {dtype!r}, expected F32, BF16 or F16")
    if keeps_original(spec):
        return file_bytes(list(_adapter(shape, spec)))
    return file_bytes([entry for part in shape.parts for entry in _weights(part, dtype)])


def saved_dtype(settings: TrainingSettings) -> str:
    """Type that the weights of a whole model are saved in: that of the base they were loaded with."""
    return {"bf16": "BF16", "fp16": "F16"}.get(settings.base, "F32")


def checkpoint_bytes(shape: ModelShape, spec: MethodSpec, settings: TrainingSettings) -> int:
    """Bytes of a checkpoint to resume from: the saved weights and the optimizer's states, wherever these are kept."""
    dtype = saved_dtype(settings)
    full = optimizer_bytes(trained_sizes(shape, spec), settings, weight_bytes=settings.base_bytes)
    adapters = optimizer_bytes(list(adapter_sizes(shape, spec)), settings)
    return artefact_bytes(shape, spec, dtype=dtype) + sum(full) + sum(adapters)


def _weights(part: Part, dtype: str, *, stem: str = "", tied_is_free: bool = True) -> Iterator[Entry]:
    name = f"{stem}{part.name}"
    match part:
        case Linear():
            if not (tied_is_free and part.tied_to):
                yield Entry(f"{name}.weight", dtype, (part.d_out, part.d_in))
            if part.bias:
                yield Entry(f"{name}.bias", dtype, (part.d_out,))
        case Table():
            yield Entry(f"{name}.weight", dtype, (part.entries, part.width))
        case Norm():
            for kind in ("weight", "bias")[: 2 if part.bias else 1]:
                yield Entry(f"{name}.{kind}", dtype, (part.width,))
        case Convolution():
            for kind, size in zip(("weight", "bias"), tensor_sizes(part), strict=False):
                yield Entry(f"{name}.{kind}", dtype, (size,))
        case _:
            return


def _adapter(shape: ModelShape, spec: MethodSpec) -> Iterator[Entry]:
    if spec.method in EXACT:
        layers = targeted(shape, spec)
        own = owned(layers, spec)
        for linear in layers:
            is_ours = spec.method is Method.BAYESIAN_LORA
            yield from _bayesian(linear, spec, own[linear.name]) if is_ours else _lora(linear, spec.rank)
    else:
        found = count(shape, spec)
        names = [linear.name for linear in targeted(shape, spec)] or [shape.name]
        for index, name in enumerate(names):
            share = _share(found.trainable - found.head, len(names), index)
            yield Entry(f"{PEFT_STEM}{name}.lora_A.weight", "F32", (share,))
            if found.stored_indices:
                yield Entry(f"{PEFT_STEM}{name}.indices", "I64", (_share(found.stored_indices, len(names), index),))
    trained = trained_in_full(shape, spec)
    for part in shape.parts:
        if part.name in trained:
            yield from _weights(part, "F32", stem=PEFT_STEM, tied_is_free=False)
    for linear in quantized_heads(shape, spec):
        stem = f"{PEFT_STEM}{linear.name}.head_"
        yield Entry(f"{stem}gates.bit_logits", "F32", (len(HEAD_SITES), GATES_PER_QUANTIZER))
        yield from _quantizers(linear, spec, HEAD_SITES, stem)


def _share(total: int, layers: int, index: int) -> int:
    return total // layers + (1 if index < total % layers else 0)


def _lora(linear: Linear, rank: int) -> Iterator[Entry]:
    stem = f"{PEFT_STEM}{linear.name}"
    yield Entry(f"{stem}.lora_A.weight", "F32", (rank, linear.d_in))
    yield Entry(f"{stem}.lora_B.weight", "F32", (linear.d_out, rank))


def _bayesian(linear: Linear, spec: MethodSpec, own: Owned) -> Iterator[Entry]:
    """A, E, B, gates, and the state of each quantizer of the layer's own."""
    stem, rank = f"{PEFT_STEM}{linear.name}.bayesian_lora_", spec.rank
    yield Entry(f"{stem}steps", "I64", ())
    yield Entry(f"{stem}down", "F32", (rank, linear.d_in))
    yield Entry(f"{stem}diagonal", "F32", (rank,))
    yield Entry(f"{stem}up", "F32", (linear.d_out, rank))
    if own.gates:
        yield Entry(f"{stem}gates.bit_logits", "F32", (len(own.gates), GATES_PER_QUANTIZER))
    if spec.learn_rank and rank > 1:
        yield Entry(f"{stem}gates.rank_logits", "F32", (rank - 1,))
    yield from _quantizers(linear, spec, own.quantizers, stem)
    if spec.compensated and "weight" in own.quantizers:
        yield Entry(f"{stem}quantizers.weight.offsets", "I8", (linear.d_out, linear.d_in))


def _quantizers(linear: Linear, spec: MethodSpec, sites: Sequence[str], stem: str) -> Iterator[Entry]:
    for site in sites:
        shape = range_shape(linear, site, spec)
        for state, dtype, size in (
            ("passes", "I64", ()),
            ("log_range", "F32", shape),
            ("maximum", "F32", shape),
            ("calibrated", "BOOL", ()),
            ("fitted", "BOOL", ()),
            ("seen_negative", "BOOL", ()),
        ):
            yield Entry(f"{stem}quantizers.{site}.{state}", dtype, size)
        if spec.affine_inputs and site == "input":
            yield Entry(f"{stem}quantizers.{site}.lows", "F32", shape)
        if spec.all_codes and site == "weight":
            yield Entry(f"{stem}quantizers.{site}.sides", "I8", shape)
