"""A linear layer with SBoRA adapters, which read chosen inputs (FA) or write chosen outputs (FB)."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from rankbits.errors import RankbitsWarning
from rankbits.tuners.linear import AdapterLinear
from rankbits.tuners.sbora.allocate import allocate
from rankbits.tuners.sbora.config import SboraConfig, Variant
from rankbits.tuners.sbora.written import (
    SliceUpdate,
    WrittenAndRequantized,
    WrittenInPlace,
    WrittenUpdates,
)

RANDOM_STANDARD_DEVIATION = 0.02
"""Of a start that is not zero."""
LOSSY_MERGE = (
    "SBoRA adapters were merged into a quantized base, which rounds the sum to its grid again: small updates are lost, "
    "and other rows and columns may change. To merge without loss, dequantize the base model, load the adapter onto "
    "that and merge there"
)


class SboraLinear(AdapterLinear):
    """y = x W0^T + bias + (alpha / r) x A^T B^T with A or B one-hot (Po et al. 2024), which is never formed.

    With the index set I of r inputs (FA) or outputs (FB):

    - FA: y = x W0^T + bias + (alpha / r) drop(x)[..., I] B^T, B [out_features, r];
    - FB: y = x W0^T + bias, y[..., I] += (alpha / r) drop(x) A^T, A [r, in_features].

    So W changes in the columns I, or in the rows I, and nowhere else. Adapters with disjoint sets change disjoint parts
    of it, yet those that are active together still add to the same outputs: disjoint weights do not mean that tasks
    cannot disturb each other.
    """

    adapter_layer_names = ("sbora_down", "sbora_up")
    other_param_names = ("sbora_indices", "sbora_shape", "sbora_dropout", "r", "scaling", "variant", "disjoint")

    sbora_down: nn.ParameterDict
    sbora_up: nn.ParameterDict
    sbora_indices: BufferDict
    sbora_shape: BufferDict
    sbora_dropout: nn.ModuleDict

    def create_containers(self) -> None:
        """Create the empty per-adapter containers."""
        self.sbora_down = nn.ParameterDict()
        self.sbora_up = nn.ParameterDict()
        self.sbora_indices = BufferDict(persistent=True)
        self.sbora_shape = BufferDict(persistent=True)
        self.sbora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.variant: dict[str, Variant] = {}
        self.disjoint: dict[str, bool] = {}
        quantized = self.quantization_backend is not None
        self._written: WrittenUpdates = WrittenAndRequantized() if quantized else WrittenInPlace()

    def update_layer(self, adapter_name: str, config: SboraConfig, key: str) -> None:
        """Add one adapter.

        Args:
            adapter_name: its name.
            config: its configuration.
            key: qualified name of this layer in the base model.

        Raises:
            ValueError: r exceeds the matrix, or a disjoint adapter does not fit beside the others; nothing has been
                added then.
        """
        variant = Variant(config.variant)
        size = self._size(variant)
        taken = self._taken(adapter_name, config, key)
        share = allocate({adapter_name: config.r}, size, seed=config.seed, layer=key, first=config.first, taken=taken)
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.alpha / config.r
        self.variant[adapter_name] = variant
        self.disjoint[adapter_name] = config.disjoint
        self.sbora_indices[adapter_name] = torch.tensor(share[adapter_name], dtype=torch.int64, device="cpu")
        self.sbora_shape[adapter_name] = self.shape_to_save()
        self.sbora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        if variant is Variant.FA:
            trained = self.sbora_up[adapter_name] = nn.Parameter(torch.zeros(self.out_features, config.r))
        else:
            trained = self.sbora_down[adapter_name] = nn.Parameter(torch.zeros(config.r, self.in_features))
        if not config.init_weights:
            nn.init.normal_(trained, std=RANDOM_STANDARD_DEVIATION)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _taken(self, adapter_name: str, config: SboraConfig, key: str) -> set[int]:
        """Indices that a new adapter must leave to others."""
        taken: set[int] = set()
        for other in self._kept_apart(adapter_name, disjoint=config.disjoint):
            variant = self.variant[other]
            if variant is not Variant(config.variant):
                raise ValueError(
                    f"{adapter_name!r} (variant {config.variant!r}) and {other!r} (variant {variant.value!r}) both "
                    f"adapt {key!r}, where chosen inputs and chosen outputs always meet, so they cannot be disjoint: "
                    "use one variant for both, or disjoint=False in both"
                )
            taken.update(self.indices_of(other))
        return taken

    def _kept_apart(self, adapter_name: str, *, disjoint: bool) -> list[str]:
        """The other adapters of this layer that must share no row or column with one."""
        return [name for name in self.variant if name != adapter_name and (disjoint or self.disjoint[name])]

    def indices_of(self, adapter_name: str) -> list[int]:
        """The inputs (FA) or outputs (FB) that an adapter has, in the order of its trained columns or rows.

        Raises:
            ValueError: they are on the meta device, so that nobody knows them.
        """
        indices = self.sbora_indices[adapter_name]
        if indices.is_meta:
            raise ValueError(
                f"the rows or columns of {adapter_name!r} are on the meta device: load the base model's weights before "
                "adapters that have to be disjoint"
            )
        chosen: list[int] = indices.tolist()
        return chosen

    def check_saved(self, adapter_name: str, saved: list[int], key: str) -> None:
        """Check indices that are about to replace those of an adapter.

        Args:
            adapter_name: which adapter.
            saved: the indices of a checkpoint.
            key: qualified name of this layer.

        Raises:
            ValueError: this layer does not have them, or they belong to an adapter that has to be disjoint.
        """
        size = self._size(self.variant[adapter_name])
        if len(set(saved)) < len(saved) or not all(0 <= index < size for index in saved):
            raise ValueError(
                f"{adapter_name!r} was saved with rows or columns {saved} of {key!r}, expected distinct numbers below "
                f"{size}: load it onto the base model it was trained on"
            )
        for other in self._kept_apart(adapter_name, disjoint=self.disjoint[adapter_name]):
            both = sorted(set(saved).intersection(self.indices_of(other)))
            if both:
                raise ValueError(
                    f"{adapter_name!r} was saved with rows or columns {both} of {key!r}, which belong to {other!r}: "
                    "adapters trained apart are disjoint where each begins (`first`) at the end of the one before it"
                )

    def _size(self, variant: Variant) -> int:
        return self.in_features if variant is Variant.FA else self.out_features

    def adapted_forward(self, x: Tensor) -> Tensor:
        """Output with the active adapters: [..., in_features] to [..., out_features]."""
        result: Tensor = self.base_layer(x)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name in self.sbora_up:
                result = result + self._from_inputs(name, x).to(result.dtype)
            elif name in self.sbora_down:
                update = self._to_outputs(name, x).to(result.dtype)
                result = result.index_add(-1, self.sbora_indices[name], update)
        return result

    def _from_inputs(self, adapter_name: str, x: Tensor) -> Tensor:
        """FA's update: [..., in_features] to [..., out_features]."""
        up = self.sbora_up[adapter_name]
        chosen = x.index_select(-1, self.sbora_indices[adapter_name])  # [..., r]
        chosen = self.sbora_dropout[adapter_name](self._cast_input_dtype(chosen, up.dtype))
        return F.linear(chosen, up) * self.scaling[adapter_name]  # [..., out_features]

    def _to_outputs(self, adapter_name: str, x: Tensor) -> Tensor:
        """FB's update of the chosen outputs: [..., in_features] to [..., r]."""
        down = self.sbora_down[adapter_name]
        x = self.sbora_dropout[adapter_name](self._cast_input_dtype(x, down.dtype))
        return F.linear(x, down) * self.scaling[adapter_name]  # [..., r]

    def slice_update(self, adapter_name: str) -> SliceUpdate:
        """The rows or columns of the update as they are now, in at least float32."""
        if adapter_name in self.sbora_up:
            dim, trained = 1, self.sbora_up[adapter_name]
        else:
            dim, trained = 0, self.sbora_down[adapter_name]
        wide = torch.promote_types(trained.dtype, torch.float32)
        values = trained.detach().to(wide) * self.scaling[adapter_name]
        return SliceUpdate(dim, self.sbora_indices[adapter_name].clone(), values)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of adapters to their rows or columns of the base weight; all other numbers keep their bits.

        A quantized base is quantized again as a whole, which loses small updates: it says so in a warning.

        Args:
            safe_merge: check that the merged rows or columns are finite before anything is stored.
            adapter_names: which adapters; the active ones if None.

        Raises:
            ValueError: `safe_merge` found NaN or infinite values; nothing has changed.
            TypeError: the backend of a quantized base cannot merge.
        """
        available = self._get_available_adapters()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in available]
        if not names:
            return
        updates = {name: self.slice_update(name) for name in names}
        if safe_merge:
            self._check_finite(updates)
        self._written.add(self, updates)
        self.merged_adapters.extend(names)
        if self.quantization_backend is not None:
            warnings.warn(LOSSY_MERGE, RankbitsWarning, stacklevel=2)

    def _check_finite(self, updates: dict[str, SliceUpdate]) -> None:
        trial = self.oriented(self.get_base_weight()).clone()
        for name, update in updates.items():
            update.put(trial, update.sum_with(trial))
            if not bool(torch.isfinite(update.slice_of(trial)).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Take adapters out of the base weight, in any order: what remains has the bits it would have without them.

        Args:
            adapter_names: which of the merged adapters; all of them if None.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        names = set(self.merged_adapters if adapter_names is None else adapter_names)
        self._written.remove(self, names)
        self.merged_adapters = [name for name in self.merged_adapters if name not in names]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the base weight, in the base layer's shape and dtype: zero outside its slice.

        For a quantized base the dtype is that of the update.
        """
        update = self.slice_update(adapter)
        dtype = update.values.dtype if self.quantization_backend is not None else self.get_base_weight().dtype
        delta = torch.zeros(self.out_features, self.in_features, dtype=dtype, device=update.values.device)
        update.put(delta, update.values.to(dtype))
        return self.oriented(delta)

    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        """A copy of a weight [out_features, in_features] with the update of one adapter."""
        update = self.slice_update(adapter_name)
        merged = weight.clone()
        update.put(merged, update.sum_with(weight))
        return merged

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raise nothing: one weight always computes what base and adapters compute."""

    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """LoRA's A [r, in_features] and B [out_features, r] with the same update, scaling[adapter_name] * B @ A.

        The only place where the one-hot matrix exists. Exact: a LoRA adapter with this r and alpha computes the same.
        """
        update = self.slice_update(adapter_name)
        if update.dim == 1:
            up = self.sbora_up[adapter_name].detach().clone()
            down = torch.zeros(up.shape[1], self.in_features, dtype=up.dtype, device=up.device)
            down[torch.arange(up.shape[1], device=up.device), update.indices] = 1.0
        else:
            down = self.sbora_down[adapter_name].detach().clone()
            up = torch.zeros(self.out_features, down.shape[0], dtype=down.dtype, device=down.device)
            up[update.indices, torch.arange(down.shape[0], device=down.device)] = 1.0
        return down, up

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is all the adapter does."""
        return True

    def __repr__(self) -> str:
        """PEFT reads the name of the method from it."""
        return "sbora." + super().__repr__()
