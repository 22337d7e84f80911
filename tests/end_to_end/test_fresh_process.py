"""What another process makes of saved adapters and pickled configurations, with and without rankbits imported."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from rankbits import BayesianLoraConfig, GateSchedule, harden
from rankbits.tuners.bayesian_lora import adapted_layers, quantized_heads

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SOURCE = Path(__file__).resolve().parents[2] / "src"
BASE = "nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))"


def _fresh(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1", "RANKBITS_COMPILE": "0"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder, check=False
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter before and after hardening, its outputs, and a pickled configuration."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
    x = torch.randn(7, 12)
    torch.save(base.state_dict(), folder / "base.pt")
    config = BayesianLoraConfig(
        r=4,
        target_modules=["0", "2"],
        init_weights=False,
        calibration_passes=1,
        quantizers=["weight", "down", "diagonal", "up", "down_output", "diagonal_output", "output", "input"],
    )
    model = get_peft_model(base, config).train()
    for _ in range(3):
        model(x)
    GateSchedule(model, 10).step()
    with torch.no_grad():
        for index, (_, layer) in enumerate(adapted_layers(model)):
            gates = layer.gates_of("default")
            gates.rank_logits[1 + index :] = -5.0
            for row, logits in enumerate(gates.bit_logits):
                logits[(row + index) % 4 :] = -3.0
    model.eval()
    outputs = {"x": x, "soft": model(x).detach()}
    model.save_pretrained(folder / "soft")
    harden(model)
    outputs["hard"] = model(x).detach()
    model.save_pretrained(folder / "hard")
    torch.save(outputs, folder / "outputs.pt")
    (folder / "config.pickle").write_bytes(pickle.dumps(model.peft_config["default"]))
    return folder


def test_another_process_unpickles_the_configuration_and_computes_the_same(saved) -> None:
    code = f"""
import pickle
config = pickle.load(open("config.pickle", "rb"))
import importlib, peft, rankbits, torch
from torch import nn
print(type(config).__name__, config.hardened_ranks, config.peft_type in peft.PEFT_TYPE_TO_CONFIG_MAPPING)
known = len(peft.PEFT_TYPE_TO_CONFIG_MAPPING)
importlib.reload(rankbits)
print(len(peft.PEFT_TYPE_TO_CONFIG_MAPPING) - known)
outputs = torch.load("outputs.pt")
for kind in ("soft", "hard"):
    base = {BASE}
    base.load_state_dict(torch.load("base.pt"))
    model = peft.PeftModel.from_pretrained(base, kind).eval()
    signs = [layer.bayesian_lora_quantizers["default"]["input"].is_signed for layer in (base[0], base[2])]
    ranks = [entry.rank for entry in rankbits.summarize(model)]
    print(torch.equal(model(outputs["x"]), outputs[kind]), signs, ranks)
"""
    answer = _fresh(code, saved)
    same = "True [True, False] [2, 3]"
    assert answer.stdout.splitlines() == [
        "BayesianLoraConfig {'0': 2, '2': 3} True",
        "0",
        same,
        same,
    ], answer.stderr


def test_another_process_computes_the_same_with_a_quantized_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 3)))
    torch.save(base.state_dict(), tmp_path / "base.pt")
    config = BayesianLoraConfig(
        r=2,
        target_modules=["0"],
        modules_to_save=["2"],
        quantizers=["weight"],
        quantize_head=True,
        calibration_passes=1,
    )
    model, x = get_peft_model(base, config).train(), torch.randn(7, 12)
    for _ in range(3):
        model(x)
    GateSchedule(model, 10).step()
    with torch.no_grad():
        for row, (_, head) in enumerate(quantized_heads(model)):
            head.gates_of("default").bit_logits[:, 1 + row :] = -3.0
    outputs = {"x": x, "soft": model.eval()(x).detach()}
    model.save_pretrained(tmp_path / "soft")
    harden(model)
    outputs["hard"] = model(x).detach()
    model.save_pretrained(tmp_path / "hard")
    torch.save(outputs, tmp_path / "outputs.pt")
    code = """
import peft, rankbits, torch
from torch import nn
outputs = torch.load("outputs.pt")
for kind in ("soft", "hard"):
    base = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 3)))
    base.load_state_dict(torch.load("base.pt"))
    model = peft.PeftModel.from_pretrained(base, kind).eval()
    print(torch.equal(model(outputs["x"]), outputs[kind]), [entry.bits for entry in rankbits.summarize(model)][1:])
"""
    answer = _fresh(code, tmp_path)
    learned = "True [{'weight': 4, 'input': 4}, {'weight': 8, 'input': 8}]"
    assert answer.stdout.splitlines() == [learned, learned], answer.stderr


def test_without_rankbits_the_error_names_the_method(saved) -> None:
    code = f"""
import torch
from peft import PeftModel
from torch import nn
PeftModel.from_pretrained({BASE}, "hard")
"""
    answer = _fresh(code, saved)
    assert answer.returncode == 1
    assert answer.stderr.strip().splitlines()[-1] == "KeyError: 'BAYESIAN_LORA'"
