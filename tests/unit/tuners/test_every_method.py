"""What holds for every method of ours in every mode, on an encoder and on a decoder: one table instead of copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_method import CONFIGS, UNMERGEABLE, adapted, base, batch
from peft import PeftModel
from torch import Tensor, nn

from rankbits import GateSchedule
from rankbits.errors import MergeError

ROUNDING = ("bayesian-lora q", "bayesian-lora q+ra", "bayesian-lora merged")
"""Methods with quantizers. At the start they clip and round nothing: the largest number may lose its last bit."""
pytestmark = [
    pytest.mark.parametrize("kind", ["encoder", "decoder"]),
    pytest.mark.filterwarnings("ignore:a quantizer is evaluated before its range was calibrated"),
]
every_method = pytest.mark.parametrize("method", CONFIGS)


def _logits(model: nn.Module, kind: str) -> Tensor:
    logits: Tensor = model(**batch(kind)).logits.detach()
    return logits


def _trained(model: PeftModel, kind: str) -> PeftModel:
    """Take some passes of training, which calibrate, and one step of the schedule where there are gates."""
    model.train()
    for _ in range(3):
        model(**batch(kind))
    if "bayesian" in model.base_model.prefix:
        GateSchedule(model, 100).step()
    return model.eval()


def _numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


@every_method
def test_the_start_is_the_base_model(kind: str, method: str) -> None:
    expected = _logits(base(kind), kind)
    model = adapted(kind, method)
    if method in ROUNDING:
        found = _logits(model.eval(), kind)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        return
    for training in (False, True):
        assert torch.equal(_logits(model.train(training), kind), expected)


@every_method
def test_all_parameters_of_the_method_are_used_in_every_pass_and_no_others_train(kind: str, method: str) -> None:
    """The condition of data parallelism: a parameter without a gradient would keep the other processes waiting."""
    model = adapted(kind, method, init_weights=False).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(model.base_model.prefix in name for name in trained)
    for _ in range(3):
        model.zero_grad()
        model(**batch(kind)).loss.backward()
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@every_method
def test_a_bfloat16_base_trains_float32_adapters(kind: str, method: str) -> None:
    full = _logits(adapted(kind, method, init_weights=False).eval(), kind)
    model = adapted(kind, method, dtype=torch.bfloat16, init_weights=False)
    half = _logits(model.eval(), kind)
    assert half.dtype == torch.bfloat16
    # A bfloat16 number has 8 bits, and some tens of roundings follow one another.
    assert (half.float() - full).abs().max() <= 0.05 * full.abs().max()
    loss = model.train()(**batch(kind)).loss
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@every_method
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_blocks_give_the_same_gradients(kind: str, method: str, use_reentrant: bool) -> None:
    model = adapted(kind, method, init_weights=False).train()
    for _ in range(2):
        model(**batch(kind))
    model.enable_input_require_grads()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        model(**batch(kind)).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


@every_method
def test_adapters_are_switched_disabled_and_deleted_without_a_trace(kind: str, method: str) -> None:
    expected = _logits(base(kind), kind)
    model = adapted(kind, method, init_weights=False)
    before = _numbers(model.eval())
    first = _logits(model, kind)
    model.add_adapter("other", CONFIGS[method](kind, init_weights=False))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "other" in name)
    assert torch.equal(_logits(model, kind), first)
    model.set_adapter("other")
    second = _logits(model.eval(), kind)
    with model.disable_adapter():
        assert torch.equal(_logits(model, kind), expected)
    assert len({tensor.sum().item() for tensor in (expected, first, second)}) == 3
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(_logits(model, kind), first)
    assert _same(_numbers(model), before)
    assert torch.equal(_logits(model.unload(), kind), expected)


@every_method
def test_a_merged_model_computes_the_same_or_merging_is_refused(kind: str, method: str) -> None:
    model = _trained(adapted(kind, method, init_weights=False), kind)
    before, expected = _numbers(model), _logits(model, kind)
    if method in UNMERGEABLE:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(MergeError, match="cannot be merged"):
                merge()
            assert _same(_numbers(model), before)
            assert torch.equal(_logits(model, kind), expected)
        return
    model.merge_adapter(safe_merge=True)
    assert not _same(_numbers(model), before)
    # Sums of some tens of float32 products, added in another order.
    torch.testing.assert_close(_logits(model, kind), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    model.unmerge_adapter()
    assert _same(_numbers(model), before)


@every_method
@pytest.mark.parametrize("names", [["default", "__base__"], ["default"] * 4])
def test_a_batch_of_mixed_adapters_is_refused(kind: str, method: str, names: list[str]) -> None:
    model = adapted(kind, method, init_weights=False).eval()
    inputs: dict[str, Any] = batch(kind)
    with pytest.raises(ValueError, match=r"adapter_names=\['default', .*cannot mix adapters in one batch"):
        model(**inputs, adapter_names=names)
    assert torch.isfinite(_logits(model, kind)).all()
