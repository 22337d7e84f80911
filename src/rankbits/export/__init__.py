"""How a trained model leaves: written in a format that others load without rankbits."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from peft import PeftModel
from torch import Tensor

from rankbits.export.format import Format
from rankbits.export.verify import Verification
from rankbits.export.write import Exported, export

__all__ = ["Exported", "Format", "Verification", "export"]


class _CallableRoom(ModuleType):
    """This package, which can be called: Python binds a loaded package to the very name of its public function."""

    def __call__(
        self,
        model: PeftModel,
        path: str | Path,
        to: str | None = None,
        *,
        example_inputs: Mapping[str, Tensor] | None = None,
    ) -> Exported:
        return export(model, path, to, example_inputs=example_inputs)


sys.modules[__name__].__class__ = _CallableRoom
