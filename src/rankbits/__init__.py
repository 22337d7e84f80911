"""Fine-tune a model and learn, in the same run, the rank and the bit width that each of its matrices needs.

`import rankbits` registers our tuners with PEFT: at once if PEFT is loaded, else the moment it is. Public names load
what they need when they are first used, so that the command line answers without loading torch.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankbits.accounting.budget import Budget as Budget
    from rankbits.accounting.measure import cost as cost
    from rankbits.export.write import export as export
    from rankbits.reports.cost_table import cost_table as cost_table
    from rankbits.training.adalora_callback import AdaloraCallback as AdaloraCallback
    from rankbits.training.adalora_schedule import AdaloraSchedule as AdaloraSchedule
    from rankbits.training.callback import RankbitsCallback as RankbitsCallback
    from rankbits.training.groups import optimizer_and_scheduler as optimizer_and_scheduler
    from rankbits.training.objective import regularization_loss as regularization_loss
    from rankbits.training.rank_callback import DyloraCallback as DyloraCallback
    from rankbits.training.rank_schedule import DyloraSchedule as DyloraSchedule
    from rankbits.training.schedule import GateSchedule as GateSchedule
    from rankbits.training.weight_change_callback import WeightChangeCallback as WeightChangeCallback
    from rankbits.tuners.bayesian_lora import BayesianLoraConfig as BayesianLoraConfig
    from rankbits.tuners.bayesian_lora import harden as harden
    from rankbits.tuners.bayesian_lora import summarize as summarize
    from rankbits.tuners.bayesian_lora.summary import summary as summary
    from rankbits.tuners.bottleneck import BottleneckConfig as BottleneckConfig
    from rankbits.tuners.dylora import DyloraConfig as DyloraConfig
    from rankbits.tuners.dylora import set_rank as set_rank
    from rankbits.tuners.mora import MoraConfig as MoraConfig
    from rankbits.tuners.sbora import SboraConfig as SboraConfig
    from rankbits.tuners.weight_change import merged_weights as merged_weights
    from rankbits.tuners.weight_change import weight_change as weight_change

__version__ = "0.1.0"

_PUBLIC = {
    "AdaloraCallback": "rankbits.training.adalora_callback",
    "AdaloraSchedule": "rankbits.training.adalora_schedule",
    "BayesianLoraConfig": "rankbits.tuners.bayesian_lora",
    "BottleneckConfig": "rankbits.tuners.bottleneck",
    "Budget": "rankbits.accounting.budget",
    "DyloraCallback": "rankbits.training.rank_callback",
    "DyloraConfig": "rankbits.tuners.dylora",
    "DyloraSchedule": "rankbits.training.rank_schedule",
    "GateSchedule": "rankbits.training.schedule",
    "MoraConfig": "rankbits.tuners.mora",
    "RankbitsCallback": "rankbits.training.callback",
    "SboraConfig": "rankbits.tuners.sbora",
    "WeightChangeCallback": "rankbits.training.weight_change_callback",
    "cost": "rankbits.accounting.measure",
    "cost_table": "rankbits.reports.cost_table",
    "export": "rankbits.export",
    "harden": "rankbits.tuners.bayesian_lora",
    "merged_weights": "rankbits.tuners.weight_change",
    "optimizer_and_scheduler": "rankbits.training.groups",
    "regularization_loss": "rankbits.training.objective",
    "set_rank": "rankbits.tuners.dylora",
    "summarize": "rankbits.tuners.bayesian_lora",
    "summary": "rankbits.tuners.bayesian_lora.summary",
    "weight_change": "rankbits.tuners.weight_change",
}
__all__ = [
    "AdaloraCallback",
    "AdaloraSchedule",
    "BayesianLoraConfig",
    "BottleneckConfig",
    "Budget",
    "DyloraCallback",
    "DyloraConfig",
    "DyloraSchedule",
    "GateSchedule",
    "MoraConfig",
    "RankbitsCallback",
    "SboraConfig",
    "WeightChangeCallback",
    "__version__",
    "cost",
    "cost_table",
    "export",
    "harden",
    "merged_weights",
    "optimizer_and_scheduler",
    "regularization_loss",
    "set_rank",
    "summarize",
    "summary",
    "weight_change",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rankbits' has no attribute {name!r}; it has {', '.join(sorted(_PUBLIC))}")
    module = importlib.import_module(_PUBLIC[name])
    # A room that can be called stands for its function, whether the room or the function was asked for first.
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


class _RegisteringLoader(importlib.abc.Loader):
    """Loads PEFT as usual, then registers our tuners with it."""

    def __init__(self, finder: _PeftFinder, loader: importlib.abc.Loader) -> None:
        self.finder = finder
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register()


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Waits for the import of PEFT and lets the usual finders find it.

    Others look PEFT up without importing it (transformers asks whether it is installed), so the finder stays until
    the module is really executed.
    """

    def __init__(self) -> None:
        self.asking = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft" or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(self, spec.loader)
        return spec


def _register() -> None:
    importlib.import_module("rankbits.tuners.register").register()


if "peft" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _PeftFinder())
