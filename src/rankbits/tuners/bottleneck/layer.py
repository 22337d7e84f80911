"""The last linear layer of a sub-layer with bottleneck adapters behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankbits.errors import MergeError, ModelError
from rankbits.tuners.bottleneck.config import (
    USUAL_FRACTION,
    USUAL_NON_LINEARITY,
    USUAL_SCALING,
    BottleneckConfig,
    Kind,
    NonLinearity,
    Start,
)
from rankbits.tuners.bottleneck.neighbours import Ear, Neighbours
from rankbits.tuners.linear import AdapterLinear

WEIGHT_STANDARD_DEVIATION = 0.02
FUNCTIONS: dict[NonLinearity, Callable[[Tensor], Tensor]] = {
    NonLinearity.RELU: F.relu,
    NonLinearity.SWISH: F.silu,
    NonLinearity.GELU: F.gelu,
    NonLinearity.TANH: torch.tanh,
}


class BottleneckLinear(AdapterLinear):
    """h + c (U dropout(f(D z + b_D)) + b_U), with h = x W0^T + bias (Houlsby et al. 2019; He et al. 2022, Table 1).

    z is h itself (Houlsby), the residual sum norm(h + q) or h + q (Pfeiffer et al. 2021), or the input of the sub-layer
    (parallel). Several active adapters read the same h, and what they add is summed. No single weight computes this, so
    merging is refused: what is shared with mergeable layers is how they wrap a linear layer, not how they merge.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "kind", "non_linearity", "scaling", "ears", "norms")

    bottleneck_down: nn.ModuleDict
    bottleneck_up: nn.ModuleDict
    bottleneck_dropout: nn.ModuleDict

    def create_containers(self) -> None:
        """Create the empty per-adapter containers."""
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.kind: dict[str, Kind] = {}
        self.non_linearity: dict[str, NonLinearity] = {}
        self.scaling: dict[str, float] = {}
        self.ears: dict[str, Ear] = {}
        # In a plain tuple, so that the norm stays a part of its block alone.
        self.norms: dict[str, tuple[nn.Module, ...]] = {}

    def update_layer(self, adapter_name: str, config: BottleneckConfig, key: str) -> None:
        """Add one adapter; what it needs of its block comes with `connect`.

        Args:
            adapter_name: its name.
            config: its configuration.
            key: qualified name of this layer in the base model.
        """
        kind, outputs = Kind(config.kind), self.out_features
        self.kind[adapter_name] = kind
        self.non_linearity[adapter_name] = NonLinearity(config.non_linearity or USUAL_NON_LINEARITY[kind])
        self.scaling[adapter_name] = USUAL_SCALING[kind] if config.scaling is None else config.scaling
        # A parallel adapter on a layer by itself reads what the layer reads.
        inputs = self.in_features if kind is Kind.PARALLEL and config.feed_forward is None else outputs
        width = config.bottleneck_size or max(1, outputs // USUAL_FRACTION[kind])
        self.bottleneck_down[adapter_name] = nn.Linear(inputs, width, bias=config.use_biases)
        self.bottleneck_up[adapter_name] = nn.Linear(width, outputs, bias=config.use_biases)
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self._start(adapter_name, config.start)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _start(self, adapter_name: str, start: Start) -> None:
        down, up = self._matrices(adapter_name)
        for matrix in (down, up):
            if matrix.bias is not None:
                nn.init.zeros_(matrix.bias)
        if start is Start.RANDOM or (start is Start.ZERO and self.kind[adapter_name] is Kind.PARALLEL):
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(down.weight, std=WEIGHT_STANDARD_DEVIATION)
        if start is Start.ZERO:
            nn.init.zeros_(up.weight)
        elif start is Start.NORMAL:
            nn.init.normal_(up.weight, std=WEIGHT_STANDARD_DEVIATION)
        else:
            nn.init.kaiming_uniform_(up.weight, a=math.sqrt(5))

    def _matrices(self, adapter_name: str) -> tuple[nn.Linear, nn.Linear]:
        """D [bottleneck, in] and U [out, bottleneck]."""
        return self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name]  # type: ignore[return-value]

    def connect(self, adapter_name: str, neighbours: Neighbours) -> None:
        """Let an adapter read what its kind reads from its block."""
        self._disconnect(adapter_name)
        if neighbours.listened is not None:
            self.ears[adapter_name] = Ear(neighbours.listened)
        self.norms[adapter_name] = () if neighbours.norm is None else (neighbours.norm,)

    def _disconnect(self, adapter_name: str) -> None:
        ear = self.ears.pop(adapter_name, None)
        if ear is not None:
            ear.close()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output in the dtype of its input: [..., in_features] to [..., out_features]."""
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            for ear in self.ears.values():
                ear.forget()

    def adapted_forward(self, x: Tensor) -> Tensor:
        """Output with the active adapters: [..., in_features] to [..., out_features]."""
        result: Tensor = self.base_layer(x)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        own = result
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                result = result + self._addition(name, self._read(name, x, own)).to(result.dtype)
        return result

    def _read(self, adapter_name: str, x: Tensor, own: Tensor) -> Tensor:
        """What an adapter reads: the layer's input x, its output, the residual sum, or its sub-layer's input."""
        kind, ear = self.kind[adapter_name], self.ears.get(adapter_name)
        if kind is Kind.HOULSBY:
            return own
        if ear is None:
            return x
        if getattr(self, "_is_replica", False):
            raise ModelError(
                f"adapter {adapter_name!r} reads the input of another module, which replicas of torch.nn.DataParallel "
                "cannot see: use one device per process (DistributedDataParallel, `torchrun`), or kind='houlsby'"
            )
        if ear.heard is None:
            raise ModelError(
                f"adapter {adapter_name!r} of kind {kind.value!r} ran, but the module of its block whose input it "
                "reads did not run before it: call the whole block, or describe it in `feed_forward`"
            )
        if kind is Kind.PARALLEL:
            return ear.heard
        total = own + ear.heard
        for norm in self.norms[adapter_name]:
            total = norm(total)
        return total

    def _addition(self, adapter_name: str, z: Tensor) -> Tensor:
        """What an adapter adds, c (U dropout(f(D z + b_D)) + b_U): [..., in] to [..., out_features]."""
        down, up = self._matrices(adapter_name)
        hidden = FUNCTIONS[self.non_linearity[adapter_name]](down(self._cast_input_dtype(z, down.weight.dtype)))
        added: Tensor = up(self.bottleneck_dropout[adapter_name](hidden))
        return added * self.scaling[adapter_name]

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and what it had put into other modules."""
        self._disconnect(adapter_name)
        super().delete_adapter(adapter_name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer without adapters; PEFT calls this for `unload` and `merge_and_unload`.

        Raises:
            MergeError: merging was asked for.
        """
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for name in list(self.ears):
            self._disconnect(name)
        return self.get_base_layer()

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raise MergeError: no weight can hold what stands behind a non-linearity."""
        for name in adapter_names:
            raise self._refusal(name)

    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        """Raise MergeError: there is no such weight, and so no difference from the base weight either."""
        raise self._refusal(adapter_name)

    def _refusal(self, adapter_name: str) -> MergeError:
        return MergeError(
            f"adapter {adapter_name!r} cannot be merged: a bottleneck adapter applies "
            f"{self.non_linearity[adapter_name].value} between its two matrices, which no single weight can do. It "
            "runs unmerged; unload() gives the base model back without it"
        )
