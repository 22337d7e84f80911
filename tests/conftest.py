"""What every test runs under: eager kernels, one thread, and property tests that draw the same examples each time."""

import os

# Sums depend on the number of threads in the last bits: processes that tests start compute with one as well.
os.environ["OMP_NUM_THREADS"] = "1"
# Compiling the kernels takes longer than most tests; those that mean the compiled code set the switch themselves.
os.environ.setdefault("RANKBITS_COMPILE", "0")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("rankbits", deadline=None, derandomize=True, database=None, print_blob=False)
settings.load_profile("rankbits")
