"""Two processes that train one model: same widths, same ranges, same weights, though each sees other rows."""

import json

import pytest
import torch

PROGRAM = """
import json
import sys
import torch
from peft import get_peft_model
from torch import nn
from rankbits import BayesianLoraConfig, GateSchedule, optimizer_and_scheduler
from rankbits.tuners.bayesian_lora import learning_adapters, summarize

rank, store, budget, steps = int(sys.argv[1]), sys.argv[2], sys.argv[3], 24
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8))
config = BayesianLoraConfig(
    r=2, placement="merged", rounding="compensated", granularity="group", group_size=8, calibration_passes=1,
    quantizers=["weight", "input"], target_modules=["0", "2", "4"], activation_ranges=sys.argv[4],
    input_granularity=sys.argv[5],
)
model = get_peft_model(base, config).train()
schedule = GateSchedule(model, steps, budget=budget, phases=(0.25, 0, 0))
optimizer, scheduler = optimizer_and_scheduler(schedule, learning_rate=0.01)
# As the Trainer wraps it: gates get no gradient once they are fixed.
wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
gates = [gates for _, _, gates in learning_adapters(model)]
own, used = torch.zeros(len(gates), 2, 4), None
for step in range(steps):
    torch.manual_seed(100 * rank + step)
    x = (1 + 3 * rank) * torch.randn(16, 16)
    (wrapped(x) - x[:, :8]).square().mean().backward()
    now = torch.stack([g.evidence for g in gates])
    before = torch.zeros_like(now) if used is None else used
    own += now - before
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    schedule.step()
    used = torch.stack([g.evidence for g in gates])
torch.distributed.destroy_process_group()
state = {name: tensor for name, tensor in model.state_dict().items() if "maximum" not in name and "passes" not in name}
print(json.dumps({
    "bits": [entry.bits for entry in summarize(model)],
    "sums": {name: tensor.double().sum().item().hex() for name, tensor in state.items()},
    "own": own.tolist(),
    "used": used.tolist(),
}))
"""


@pytest.mark.parametrize(
    ("budget", "ranges", "inputs"),
    [
        ("bits=2", "largest", "tensor"),
        ("bits=4", "largest", "group"),
        ("bops=0.0625", "fitted", "group"),
        ("bops=0.0625", "affine", "group"),
    ],
)
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs PyTorch's gloo backend")
def test_processes_choose_by_the_evidence_of_all_and_stay_equal(
    two_processes, budget: str, ranges: str, inputs: str
) -> None:
    first, second = (json.loads(printed.splitlines()[-1]) for printed in two_processes(PROGRAM, budget, ranges, inputs))
    assert first["bits"] == second["bits"]
    assert first["sums"] == second["sums"]
    own = [torch.tensor(found["own"]) for found in (first, second)]
    assert not torch.allclose(own[0], own[1], rtol=0.1)
    assert first["used"] == second["used"]
    if ranges == "largest":  # fitted ranges scale it
        torch.testing.assert_close(torch.tensor(first["used"]), (own[0] + own[1]) / 2, rtol=1e-4, atol=1e-12)
