"""Recomputed passes of activation checkpointing: they repeat the mode of the first pass and count nothing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rankbits.quant.quantizer import Quantizer

SOFT = torch.tensor([0.9, 0.5, 0.7, 0.3])
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


class _Block(torch.nn.Module):
    """Counts how often it runs, so that a test knows that a pass was recomputed."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.quantizer = Quantizer(calibration_passes=passes)
        self.runs = 0
        self.identities: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        y = self.quantizer(x, SOFT, hard=False)
        self.identities.append(torch.equal(y, x))
        return y.sin()


def _step(block: _Block, reentrant: bool | None, scale: float = 1.0) -> torch.Tensor:
    x = (torch.linspace(-1.0, 1.0, 9) * scale).requires_grad_()
    y = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
    y.sum().backward()
    return x.grad


@REENTRANT
def test_recomputed_passes_do_not_advance_the_counter_and_use_the_same_mode(reentrant):
    block = _Block(passes=3)
    for done in range(3):
        _step(block, reentrant)
        assert int(block.quantizer.passes) == done + 1
        assert not block.quantizer.is_calibrated
    _step(block, reentrant)
    assert block.runs == 8
    assert block.identities == [True] * 6 + [False] * 2
    assert int(block.quantizer.passes) == 3


@REENTRANT
def test_gradients_equal_those_without_checkpointing(reentrant):
    ours, plain = _Block(passes=2), _Block(passes=2)
    for scale in (1.0, 0.5, 1.5, 2.0):
        assert torch.equal(_step(ours, reentrant, scale), _step(plain, None, scale))
        if plain.quantizer.is_calibrated:
            assert torch.equal(ours.quantizer.log_range.grad, plain.quantizer.log_range.grad)
    assert torch.equal(ours.quantizer.maximum, plain.quantizer.maximum)
