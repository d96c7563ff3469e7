"""One thread: the tests are small, and threads that wait for each other are most of their time."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)
