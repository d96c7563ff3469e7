"""One thread: the tests are small, and threads that wait for each other are most of their time.

Without a GPU Triton's kernels are interpreted. That is decided when triton is first imported, which
torch does by itself in `tests.support`.
"""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
