"""MACs predicted from a config alone, and MACs that PyTorch's FLOP counter sees a live model run."""

from collections.abc import Callable
from typing import Any

import tiny_models
import torch
from torch.utils.flop_counter import FlopCounterMode

from rankbits.accounting.architectures.read import Head
from rankbits.accounting.macs import products
from rankbits.accounting.spec import MethodSpec
from rankbits.records import CountOptions


def predicted(
    values: dict[str, Any], spec: MethodSpec | None = None, *, top: Head = Head.LANGUAGE_MODEL, **options: Any
) -> int:
    """MACs from the config dictionary alone, under the given `CountOptions`."""
    return sum(product.macs for product in products(tiny_models.read(values, top), CountOptions(**options), spec))


def counter_after(run: Callable[[], object]) -> FlopCounterMode:
    """The counter, by module at any depth, after one pass without gradients."""
    with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():
        run()
    return counter


def counted(run: Callable[[], object]) -> int:
    """MACs of one pass without gradients: half of the counter's operations."""
    macs, odd = divmod(counter_after(run).get_total_flops(), 2)
    assert not odd
    return macs
