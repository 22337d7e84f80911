"""Every method of ours in other processes: loaded from its folder, and trained by two processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from every_method import CONFIGS, adapted, batch

from rankbits import GateSchedule

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
KINDS = ("encoder", "decoder")
LOAD = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from every_method import base, batch
import rankbits

for folder in [path for path in Path().iterdir() if path.is_dir()]:
    kind = folder.name.partition(" ")[0]
    model = PeftModel.from_pretrained(base(kind), folder).eval()
    found, expected = model(**batch(kind)).logits.detach(), torch.load(f"{folder.name}.pt")
    # PyTorch folds a product of three dimensions or not by whether the matrix is trained, which it no longer is here.
    near = bool((found - expected).abs().max() <= 1e-6 * expected.abs().max())
    print(folder.name, near, sep=": ")
"""
TRAIN = """
import sys, torch
from every_method import CONFIGS, adapted, batch

rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

def learned(model, trained, kind, rows):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs = {name: tensor[rows] for name, tensor in batch(kind).items()}
    for step in range(3):
        torch.manual_seed(10 * step + rank)  # each process draws its own gates
        optimizer.zero_grad()
        trained(**inputs).loss.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters() if p.requires_grad]

for kind in ("encoder", "decoder"):
    for method in CONFIGS:
        model = adapted(kind, method, init_weights=False).train()
        # Fails at the second step if a parameter was not used in the first.
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        half = slice(2 * rank, 2 * rank + 2)
        ours = learned(model, parallel, kind, half)
        sizes = [round(p.double().abs().sum().item(), 9) for p in ours]
        both = [None, None]
        torch.distributed.all_gather_object(both, sizes)
        assert both[0] == both[1], f"{kind} {method}: the processes went apart"
        if "bayesian-lora" not in method or method.endswith(" ra"):
            # Without noise two halves of a batch teach what the whole of it does.
            alone = adapted(kind, method, init_weights=False).train()
            for mine, theirs in zip(ours, learned(alone, alone, kind, slice(None)), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=f"{kind} {method}")
torch.distributed.destroy_process_group()
print("equal")
"""


def _environment() -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("src", "tests/tiny"))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RANKBITS_COMPILE": "0", "HF_HUB_OFFLINE": "1"}


def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    for kind in KINDS:
        for method in CONFIGS:
            model = adapted(kind, method, init_weights=False).train()
            for _ in range(3):
                model(**batch(kind))
            if "bayesian-lora" in method:
                GateSchedule(model, 100).step()
            model.eval().save_pretrained(str(tmp_path / f"{kind} {method}"))
            torch.save(model(**batch(kind)).logits.detach(), tmp_path / f"{kind} {method}.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOAD]
    answer = subprocess.run(
        command, capture_output=True, text=True, env=_environment(), cwd=tmp_path, check=False, timeout=600
    )
    expected = {f"{kind} {method}: True" for kind in KINDS for method in CONFIGS}
    assert set(answer.stdout.splitlines()) == expected, answer.stderr


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs PyTorch's gloo backend")
def test_two_processes_use_every_parameter_and_stay_together(two_processes) -> None:
    assert two_processes(TRAIN, PYTHONWARNINGS="ignore", **_environment()) == ["equal\n", "equal\n"]
