"""Reloading what was written with the library it was written for, and comparing what both models compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankbits.errors import ExportError
from rankbits.export.copies import sharing_copy
from rankbits.export.format import Format


@dataclass(frozen=True)
class Verification:
    """How near a reloaded model is to the one that was exported.

    Args:
        loader: what reloaded it, such as "peft 0.21.2".
        largest_difference: largest absolute difference of two output values; NaN if either model gave NaN.
        largest_output: largest magnitude of what the exported model gave.
        tolerance: largest difference allowed, as a share of `largest_output`: the square root of the machine epsilon
            of the narrowest floating-point weights, half of their digits (3.5e-4 in float32, 0.088 in bfloat16).
    """

    loader: str
    largest_difference: float
    largest_output: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; false for NaN."""
        return self.largest_difference <= self.tolerance * self.largest_output

    def __str__(self) -> str:
        """One line with the difference, the outputs it has to be seen against, and the tolerance."""
        return (
            f"reloaded with {self.loader}: largest difference {self.largest_difference:.3g} beside outputs up to "
            f"{self.largest_output:.3g}, tolerance {self.tolerance:.2g} of that"
        )


@torch.no_grad()
def verify(model: PeftModel, folder: Path, to: Format, example_inputs: Mapping[str, Tensor]) -> Verification:
    """Reload a folder without any part of rankbits in the model, and compare outputs in evaluation mode.

    Args:
        model: what was exported; it stays as it is, its mode and its gradients included.
        folder: what was written.
        to: the format of the folder.
        example_inputs: keyword arguments of the model, on its device. All floating-point outputs are compared.

    Returns:
        What was found, whether it holds or not.

    Raises:
        ExportError: the model gives no floating-point tensors, or the two models give different ones.
    """
    ours = sharing_copy(model).eval()
    expected = dict(_tensors(ours(**example_inputs)))
    tolerance = max(
        torch.finfo(t.dtype).eps for t in (*model.parameters(), *expected.values()) if t.is_floating_point()
    )
    if to is Format.LORA:
        loader, reloaded = _with_peft(ours, folder)
    else:
        loader, reloaded = _with_transformers(model, folder)
    given = dict(_tensors(reloaded.eval()(**example_inputs)))
    if not expected or {k: t.shape for k, t in expected.items()} != {k: t.shape for k, t in given.items()}:
        raise ExportError(
            f"{folder}: outputs cannot be compared: the model gives {_shapes(expected)}, what was reloaded with "
            f"{loader} {_shapes(given)}; expected the same floating-point tensors, and at least one"
        )
    differences = torch.stack([_largest(given[key].double() - expected[key].double()) for key in expected])
    outputs = torch.stack([_largest(tensor.double()) for tensor in expected.values()])
    return Verification(loader, differences.max().item(), outputs.max().item(), tolerance**0.5)


def _with_peft(ours: PeftModel, folder: Path) -> tuple[str, nn.Module]:
    import peft

    base: Any = ours.unload()
    device = str(next(base.parameters()).device)
    return f"peft {peft.__version__}", PeftModel.from_pretrained(base, str(folder), torch_device=device)


def _with_transformers(model: PeftModel, folder: Path) -> tuple[str, nn.Module]:
    import transformers

    base: Any = model.get_base_model()
    assert isinstance(base, PreTrainedModel), "only transformers models are merged into a folder"
    attention = base.config._attn_implementation
    loaded: Any = type(base).from_pretrained(str(folder), dtype="auto", attn_implementation=attention)
    return f"transformers {transformers.__version__}", loaded.to(base.device)


def _tensors(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of what a model returned, by their place in it; caches are no outputs."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(value, f"{name}.{key}")
    elif isinstance(output, tuple | list):
        for index, value in enumerate(output):
            yield from _tensors(value, f"{name}.{index}")


def _largest(values: Tensor) -> Tensor:
    return values.abs().max().cpu() if values.numel() else torch.zeros((), dtype=torch.float64)


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in tensors.items()) or "none"
