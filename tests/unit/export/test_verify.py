"""Verification: what is compared, in which mode, and what does not pass."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny_adapters import configs
from torch import nn

import rankbits
from rankbits import DyloraConfig
from rankbits.errors import ExportError
from rankbits.export import Format, Verification
from rankbits.export.verify import verify


@pytest.fixture
def exported(base, trained, tmp_path):
    model = trained(base("linear"), configs()["dylora"])
    rankbits.export(model, tmp_path / "adapter", to="lora")
    return model, tmp_path / "adapter"


def test_the_largest_difference_of_any_output_is_found(exported, base, rows) -> None:
    model, folder = exported
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.2.lora_B.weight"
    tensors[key][3] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    with torch.no_grad():
        hidden = model.base_model.model[1](model.base_model.model[0](rows))
        down = tensors["base_model.model.2.lora_A.weight"]
        moved = (5.0 / 3) * (hidden @ down.T @ tensors[key][3] / 3).abs().max()
    found = verify(model.train(), folder, Format.LORA, {"input": rows})
    # The third part of a row that was made half as large again is what it moved by.
    assert found.largest_difference == pytest.approx(float(moved), rel=1e-4)
    assert found.largest_output == pytest.approx(float(model.eval()(rows).detach().abs().max()), rel=1e-6)
    assert not found.holds
    assert model.training is False


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 2**-26), (torch.float32, 2**-11.5), (torch.bfloat16, 2**-3.5)]
)
def test_the_tolerance_is_half_of_the_digits(base, trained, tmp_path, dtype, tolerance: float) -> None:
    model = trained(base("linear").to(dtype), configs()["sbora fb"])
    rows = torch.randn(3, 12, dtype=dtype)
    found = rankbits.export(model, tmp_path / "a", to="lora", example_inputs={"input": rows}).verification
    assert found.tolerance == pytest.approx(tolerance)
    assert found.holds


def test_the_bounds_of_holding() -> None:
    assert Verification("peft", 0.5, 2.0, 0.25).holds
    assert not Verification("peft", 0.51, 2.0, 0.25).holds
    assert Verification("peft", 0.0, 0.0, 0.25).holds
    assert not Verification("peft", math.nan, 2.0, 0.25).holds
    assert str(Verification("peft 1", 0.5, 2.0, 0.25)) == (
        "reloaded with peft 1: largest difference 0.5 beside outputs up to 2, tolerance 0.25 of that"
    )


def test_outputs_without_numbers_are_refused(tmp_path) -> None:
    class Choice(nn.Sequential):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    model = get_peft_model(Choice(nn.Linear(4, 3)), DyloraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ExportError, match="outputs cannot be compared: the model gives none"):
        rankbits.export(model, tmp_path / "out", to="lora", example_inputs={"x": torch.randn(2, 4)})
    assert list(tmp_path.iterdir()) == []


def test_losses_and_hidden_states_are_compared_and_caches_are_not(gpt2, ids, trained, tmp_path) -> None:
    config = DyloraConfig(r=2, target_modules=["c_attn", "c_proj"], init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(gpt2, config)
    inputs = ids | {"labels": ids["input_ids"], "output_hidden_states": True, "use_cache": True}
    found = rankbits.export(model, tmp_path / "out", to="merged", example_inputs=inputs).verification
    outputs = model.eval()(**inputs)
    sizes = [t.detach().abs().max() for t in (outputs.loss, outputs.logits, *outputs.hidden_states)]
    assert found.largest_output == pytest.approx(float(max(sizes)), rel=1e-6)
    assert found.largest_difference <= 1e-6 * found.largest_output
    assert found.loader.startswith("transformers ")
