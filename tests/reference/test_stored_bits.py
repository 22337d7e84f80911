"""Bytes of 4-bit weights and 8-bit optimizer states, against those that bitsandbytes holds."""

from __future__ import annotations

import pytest
import torch

from rankbits.accounting.settings import TrainingSettings
from rankbits.accounting.states import optimizer_bytes
from rankbits.accounting.weights import nf4_bytes

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("shape", [(64, 64), (100, 70), (33, 5), (384, 384)])
@pytest.mark.parametrize("double", [False, True])
def test_a_4_bit_weight(shape: tuple[int, int], double: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    held = [codes, state.absmax, state.code]
    if double:
        held += [state.offset, state.state2.absmax, state.state2.code]
    assert nf4_bytes(weight.numel(), double=double) == sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize("size", [4095, 4096, 5000])
def test_8_bit_adam(size: int) -> None:
    weight = torch.nn.Parameter(torch.randn(size))
    optimizer = bitsandbytes.optim.AdamW8bit([weight])
    for group_index, group in enumerate(optimizer.param_groups):
        optimizer.init_state(group, weight, group_index, 0)
    state = optimizer.state[weight]
    tables = {"qmap1", "qmap2"}
    held = sum(value.nbytes for name, value in state.items() if torch.is_tensor(value) and name not in tables)
    settings = TrainingSettings(batch=1, sequence_length=1, optimizer="adamw-8bit")
    assert optimizer_bytes([size], settings) == (held, 0)
