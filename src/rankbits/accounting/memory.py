"""Peak memory of training and inference from sizes alone, in bytes, item by item.

On a CPU the peak is the process's largest resident set; on a GPU it is what the device holds. Everything is counted at
once: weights, gradients, optimizer states and the activations of one pass. A heap that keeps what was freed makes that
nearly so on a CPU (measured: benchmarks/memory); elsewhere it is what accumulating gradients over several passes takes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from rankbits.accounting.activations import forward_bytes
from rankbits.accounting.methods import extra_keys
from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.spec import Activation, Method, MethodSpec, ModelShape
from rankbits.accounting.states import optimizer_bytes
from rankbits.accounting.weights import adapter_sizes, trained_sizes, weights_bytes
from rankbits.accounting.widths import four_bit_layers

MIB = 2**20
RUNTIME_CPU = 548 * MIB
"""Resident bytes of a process that trains a model of no size with torch, transformers, PEFT and rankbits: their code
and tables. Measured with torch 2.13, transformers 5.23 and PEFT 0.21 on Linux (benchmarks/memory, cases "none")."""
RUNTIME_COMPILER = 53 * MIB
"""What torch.compile adds to the process that calls it; its worker processes are not counted."""
RUNTIME_CUDA = 500 * MIB
"""A CUDA context with the libraries' kernels: the usual size, not measured here."""
HOLES = (3, 5)
"""Share of temporary bytes that stay in glibc's heap as holes when they are freed: an empirical number, chosen on
MiniLM and SmolLM2, where single runs ask for 0.4 (Llama's blocks) to 0.8 (BERT's). Why holes are not used again is not
established; that they are the heap's is: with MALLOC_MMAP_THRESHOLD_=131072 they are gone (benchmarks/memory)."""
FLOAT = 4


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes at the peak, by what they are for.

    Args:
        weights: base model and adapters, at the width they are held in.
        gradients: of all that is trained.
        optimizer: its states, and fp32 copies of trained weights.
        activations: what the backward pass needs; at inference, keys and values in the cache.
        logits: of a head over a vocabulary: log-probabilities and two gradients of their size.
        workspace: temporary tensors, and holes in the heap.
        runtime: the process, or the device's context.
        reused: negative: gradients that take pages which activations gave back, where the heap gives pages back.
        host: optimizer states that a paged optimizer may move to the host; not in the total.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    runtime: int
    reused: int = 0
    host: int = 0

    @property
    def items(self) -> dict[str, int]:
        """All items of the total by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "host"}

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.items.values())


def training_memory(shape: ModelShape, spec: MethodSpec, settings: TrainingSettings) -> MemoryEstimate:
    """Peak memory of a training run.

    Args:
        shape: the model, with the head it is trained with.
        spec: the method.
        settings: batch, length, precision, base, optimizer, device.

    Raises:
        ModelError: the method's targets match nothing, or a size is not possible.
    """
    passed = forward_bytes(shape, spec, settings)
    full, adapters = trained_sizes(shape, spec), [size for size in adapter_sizes(shape, spec) if size]
    states, host = optimizer_bytes(full, settings, weight_bytes=settings.base_bytes)
    adapter_states, adapter_host = optimizer_bytes(adapters, settings)
    holes = settings.device == "cpu" and not settings.fixed_mmap_threshold
    gradients = sum(full) * settings.base_bytes + sum(adapters) * FLOAT
    backward = passed.kept + 3 * passed.logits
    returned = settings.device == "cpu" and settings.fixed_mmap_threshold
    return MemoryEstimate(
        weights=weights_bytes(shape, spec, settings),
        gradients=gradients,
        optimizer=states + adapter_states,
        activations=passed.kept,
        # The gradient by the log-probabilities and the gradient by the logits stand beside what was kept.
        logits=3 * passed.logits,
        workspace=2 * passed.largest
        + _dequantized(shape, spec, settings)
        + (passed.temporary * HOLES[0] // HOLES[1] if holes else 0),
        runtime=runtime_bytes(spec, settings),
        # One grows as the other shrinks, so that both at once are never more than the larger.
        reused=-min(gradients, backward) if returned else 0,
        host=host + adapter_host,
    )


def runtime_bytes(spec: MethodSpec, settings: TrainingSettings) -> int:
    """Bytes of the process, or of the device's context, before there is a model."""
    if settings.device == "cuda":
        return RUNTIME_CUDA
    compiles = settings.compiled and spec.method is Method.BAYESIAN_LORA and bool(spec.sites)
    return RUNTIME_CPU + (RUNTIME_COMPILER if compiles else 0)


def _dequantized(shape: ModelShape, spec: MethodSpec, settings: TrainingSettings) -> int:
    """The largest 4-bit weight, unpacked for one product."""
    if settings.base not in {"nf4", "nf4-double"}:
        return 0
    narrow = four_bit_layers(shape, spec)
    sizes = [linear.d_in * linear.d_out for linear in shape.linears() if linear.name in narrow]
    return max(sizes, default=0) * settings.activation_bytes


def kv_cache_bytes(shape: ModelShape, batch: int, length: int, *, element_bytes: int) -> int:
    """Keys and values of all layers: 2 layers B S G c bytes, with G key heads of width c (Ainslie et al. 2023).

    A window bounds S. Models that do not generate have no cache.
    """
    if not shape.decoder:
        return 0
    total = 0
    for attention in shape.attentions():
        seen = length if attention.window is None else min(length, attention.window)
        total += 2 * batch * seen * attention.key_heads * attention.head_dim * element_bytes
    return total


def inference_memory(shape: ModelShape, spec: MethodSpec, settings: TrainingSettings) -> MemoryEstimate:
    """Peak memory of a forward pass without gradients, adapters beside the base, at the whole sequence length.

    A decoder fills its cache and takes logits at the last position only. The workspace is the largest tensor twice,
    before and after its activation (three times where it is gated), the residual stream and its norm; measured on a
    CPU, cache, logits and workspace together are 0.85 to 1 times what is live.

    Raises:
        ModelError: the method's targets match nothing.
    """
    width = settings.activation_bytes
    keys = settings.sequence_length + extra_keys(spec)
    copies = 3 if any(isinstance(part, Activation) and part.gated for part in shape.parts) else 2
    largest = forward_bytes(shape, spec, replace(settings, dropout=False)).largest
    heads = [linear.d_out for linear in shape.linears() if linear.op == "head"]
    vocabulary = heads[-1] if heads and shape.decoder else 0
    return MemoryEstimate(
        weights=weights_bytes(shape, spec, settings),
        gradients=0,
        optimizer=0,
        activations=kv_cache_bytes(shape, settings.batch, keys, element_bytes=width),
        logits=settings.batch * vocabulary * width,
        workspace=copies * largest + 2 * settings.tokens * shape.hidden * width + _dequantized(shape, spec, settings),
        runtime=runtime_bytes(spec, settings),
    )
