"""A linear layer with MoRA adapters: one square matrix each, between a compression and a decompression."""

from __future__ import annotations

import math

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from rankbits.tuners.linear import AdapterLinear
from rankbits.tuners.mora import update
from rankbits.tuners.mora.config import MoraConfig
from rankbits.tuners.mora.side import Rounding, largest_rank, square_side
from rankbits.tuners.mora.update import Form, MoraType


class MoraLinear(AdapterLinear):
    """y = W0 x + bias + f_decomp(M f_comp(drop(x))), Jiang et al. 2024, Eq. 4."""

    adapter_layer_names = ("mora_M",)
    other_param_names = ("mora_dropout", "mora_shape", "r", "forms")

    def create_containers(self) -> None:
        """Create the empty per-adapter containers."""
        self.mora_M = nn.ParameterDict()
        self.mora_dropout = nn.ModuleDict()
        self.mora_shape = BufferDict(persistent=True)
        self.r: dict[str, int] = {}
        self.forms: dict[str, Form] = {}

    def update_layer(self, adapter_name: str, config: MoraConfig, key: str) -> None:
        """Add one adapter.

        Args:
            adapter_name: its name.
            config: its configuration.
            key: qualified name of this layer in the base model.

        Raises:
            ValueError: the square matrix of this rank would be larger than the layer; nothing has changed then.
        """
        form = form_of(config, key, (self.out_features, self.in_features))
        matrix = torch.zeros(form.side, form.side)
        if not config.init_weights:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.r[adapter_name] = config.r
        self.forms[adapter_name] = form
        self.mora_M[adapter_name] = nn.Parameter(matrix)
        self.mora_shape[adapter_name] = self.shape_to_save()
        self.mora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapted_forward(self, x: Tensor) -> Tensor:
        """Output with the active adapters: [..., in_features] to [..., out_features]."""
        result: Tensor = self.base_layer(x)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name in self.mora_M:
                matrix = self.mora_M[name]
                dropped = self.mora_dropout[name](self._cast_input_dtype(x, matrix.dtype))
                result = result + update.update_output(dropped, matrix, self.forms[name]).to(result.dtype)
        return result

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Nothing is ever raised: every type of MoRA is a linear map of its input."""

    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        """W0 + delta W, in at least float32.

        Args:
            adapter_name: which adapter.
            weight: [out_features, in_features], float32.
        """
        return weight + update.delta_weight(self._matrix(adapter_name), self.forms[adapter_name])

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the base weight, in its shape and dtype, made of M alone and so free of rounding."""
        delta = update.delta_weight(self._matrix(adapter), self.forms[adapter])
        return self.oriented(delta).to(self.get_base_weight().dtype)

    @torch.no_grad()
    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A [side, in_features] and B [out_features, side] of a plain LoRA whose B A, unscaled, is the update.

        For truncation and the four kinds of sharing. Decoupling and rotation have an update of full rank in general,
        min(in_features, out_features), which is no smaller pair.

        Raises:
            ValueError: the adapter is of one of these two types.
        """
        return update.lora_factors(self._matrix(adapter_name), self.forms[adapter_name])

    def _matrix(self, adapter_name: str) -> Tensor:
        matrix: Tensor = self.mora_M[adapter_name]
        return matrix.to(torch.promote_types(matrix.dtype, torch.float32))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False for types that work by blocks: PEFT's conversion could only approximate an update of full rank."""
        return adapter_name not in self.forms or not self.forms[adapter_name].works_by_blocks

    def __repr__(self) -> str:
        return "mora." + super().__repr__()


def form_of(config: MoraConfig, key: str, shape: tuple[int, int]) -> Form:
    """The map of an adapter in one layer.

    Args:
        config: of the adapter.
        key: qualified name of the layer.
        shape: (out_features, in_features).

    Raises:
        ValueError: the square matrix would be larger than the layer.
    """
    out_features, in_features = shape
    rounding, even = Rounding(config.rounding), config.kind is MoraType.ROTATION
    most = largest_rank(in_features, out_features, rounding=rounding, even=even)
    side = square_side(config.r, in_features, out_features, rounding=rounding, even=even)
    if config.r > most:
        fits = f"r <= {most}" if most else "no r fits: leave the layer out with exclude_modules"
        raise ValueError(
            f"`r`={config.r} gives MoRA's matrix side {side} in {key!r}, whose weight is {list(shape)}: expected at "
            f"most {min(shape)}, so {fits}"
        )
    return Form(config.kind, in_features, out_features, side, config.fold)
