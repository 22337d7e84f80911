"""Copies that share tensors: no storage of their own but what was asked for, and no way back into the model."""

from __future__ import annotations

import torch
from tiny_adapters import snapshot, unchanged
from torch import nn

from rankbits.export.copies import sharing_copy


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def test_all_tensors_are_shared_but_those_asked_for() -> None:
    model = _model()
    copied = sharing_copy(model, own=[model[2].bias])
    for (name, ours), theirs in zip(copied.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
        assert (ours.data_ptr() == theirs.data_ptr()) is (name != "2.bias")
    assert copied[2].weight is copied[0].weight
    assert copied[0] is not model[0]


def test_replacing_and_freezing_leave_the_model_alone() -> None:
    model = _model()
    before = snapshot(model)
    copied = sharing_copy(model, own=[model[2].bias]).eval()
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    copied[0].weight.data = torch.zeros(3, 3)
    copied[1].running_mean = torch.ones(3)
    with torch.no_grad():
        copied[2].bias.add_(1.0)
    assert unchanged(before, model)
