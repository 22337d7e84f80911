"""The formula of a convolution gives exactly what PyTorch's FLOP counter sees, transposed, grouped, strided or not."""

from math import prod

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rankbits.accounting.macs import convolution_macs
from rankbits.accounting.spec import Convolution

KINDS = {nn.Conv1d: (11,), nn.Conv2d: (11, 9), nn.ConvTranspose1d: (6,), nn.ConvTranspose2d: (6, 5)}
"""Each kind of layer with the extent of its input."""


def _counted(model: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def _described(layer: nn.Module, name: str = "") -> Convolution:
    return Convolution(
        name,
        layer.in_channels,
        layer.out_channels,
        tuple(layer.kernel_size),
        groups=layer.groups,
        bias=layer.bias is not None,
        transposed=layer.transposed,
    )


def _positions(layer: nn.Module, x: torch.Tensor) -> int:
    """Output positions by the formula of the layers' own documentation; input positions where it is transposed."""
    if layer.transposed:
        return prod(x.shape[2:])
    sizes = zip(x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True)
    return prod((length + 2 * pad - reach * (kernel - 1) - 1) // step + 1 for length, pad, reach, kernel, step in sizes)


@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"padding": 1}, {"stride": 3, "padding": 2, "dilation": 2}])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_convolution(kind, batch, groups, settings):
    layer = kind(8, 12, 3, groups=groups, **settings)
    x = torch.randn(batch, 8, *KINDS[kind])
    expected = convolution_macs(_described(layer), batch, _positions(layer, x))
    assert _counted(layer, x) == expected


def test_the_formula_by_hand():
    """Batch x C_out x output positions x C_in/groups x kernel volume, and its transposed twin."""
    plain = Convolution("conv", 8, 12, (3, 5), groups=2)
    assert convolution_macs(plain, 3, 20) == 3 * 12 * 20 * (8 // 2) * 15
    transposed = Convolution("conv", 8, 12, (3, 5), groups=2, transposed=True)
    assert convolution_macs(transposed, 3, 20) == 3 * 8 * 20 * (12 // 2) * 15


def test_a_convolution_as_wide_as_deep_in_each_channel():
    """One group per channel: the multiplier C_in / groups is 1."""
    layer = nn.Conv2d(8, 8, (3, 1), groups=8)
    x = torch.randn(2, 8, 10, 4)
    expected = convolution_macs(_described(layer), 2, 8 * 4)
    assert expected == 2 * 8 * 32 * 3
    assert _counted(layer, x) == expected


class _OneConvolution(nn.Module):
    def __init__(self, **settings: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}])
def test_lora_on_a_convolution_is_one_to_the_rank_and_one_of_single_positions(settings):
    base, rank, x = _OneConvolution(**settings).eval(), 4, torch.randn(2, 8, 11, 9)
    conv, positions = _described(base.conv), _positions(base.conv, x)
    down = Convolution("down", 8, rank, conv.kernel, bias=False)
    up = Convolution("up", rank, 12, (1, 1), bias=False)
    expected = [convolution_macs(part, 2, positions) for part in (conv, down, up)]
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=["conv"])).eval()
    assert _counted(model, x) == sum(expected)
    merged = model.merge_and_unload()
    assert _counted(merged, x) == expected[0]
