"""Data-parallel calibration: every process ends with the largest magnitude that any of them saw."""

import json

import pytest
import torch

PROGRAM = """
import json, sys
import torch
from rankbits.quant.grid import Signedness
from rankbits.quant.quantizer import Quantizer

rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
gates = torch.full((4,), 0.5)
both = Quantizer(calibration_passes=2, signedness=Signedness.AUTO)
for batch in [([1.0], [3.0]), ([-2.0], [0.5]), ([1.0], [1.0])]:
    both(torch.tensor(batch[rank]), gates, hard=False)
# One process saw nothing but zeros: alone it would go on calibrating.
one = Quantizer(calibration_passes=1)
for batch in [([0.0], [0.25]), ([1.0], [1.0])]:
    one(torch.tensor(batch[rank]), gates, hard=False)
seen = [
    {"calibrated": q.is_calibrated, "signed": q.is_signed, "range": q.range_.item(), "passes": int(q.passes)}
    for q in (both, one)
]
torch.distributed.destroy_process_group()
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs PyTorch's gloo backend")
def test_the_largest_magnitude_of_all_processes_becomes_the_range(two_processes):
    outputs = two_processes(PROGRAM)
    first, second = (json.loads(printed.strip().splitlines()[-1]) for printed in outputs)
    assert first == second
    assert first[0] == {"calibrated": True, "signed": True, "range": pytest.approx(3.0, rel=1e-6), "passes": 2}
    assert first[1] == {"calibrated": True, "signed": True, "range": pytest.approx(0.25, rel=1e-6), "passes": 1}
