"""Two processes that train one model: same widths, same ranges, same weights, though each sees other rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import sys
import torch
from peft import get_peft_model
from torch import nn
from rankbits import BayesianLoraConfig, GateSchedule
from rankbits.tuners.bayesian_lora import summarize

rank, store, budget = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8))
config = BayesianLoraConfig(
    r=2, placement="merged", rounding="compensated", granularity="group", group_size=8, calibration_passes=1,
    quantizers=["weight", "input"], target_modules=["0", "2", "4"],
)
model = get_peft_model(base, config).train()
schedule = GateSchedule(model, 24, budget=budget, phases=(0.25, 0, 0))
# As the Trainer wraps it: gates get no gradient once they are fixed.
wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for step in range(24):
    torch.manual_seed(100 * rank + step)
    x = (1 + 3 * rank) * torch.randn(16, 16)
    (wrapped(x) - x[:, :8]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
torch.distributed.destroy_process_group()
state = {name: tensor for name, tensor in model.state_dict().items() if "maximum" not in name and "passes" not in name}
print([entry.bits for entry in summarize(model)])
print("\\n".join(f"{name} {tensor.double().sum().item().hex()}" for name, tensor in state.items()))
"""


@pytest.mark.parametrize("budget", ["bits=2", "bits=4"])
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs PyTorch's gloo backend")
def test_processes_choose_the_same_widths_and_keep_the_same_ranges(tmp_path: Path, budget: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "store"), budget],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0].splitlines() == outputs[1][0].splitlines()
