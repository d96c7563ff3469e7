"""What the kernels share."""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sequence_of(p_cu, o_t, B, halvings):
    """The last i in 0 .. B with cu[i] <= t: which sequence owns each position, B in the tail."""
    b_low = tl.zeros_like(o_t)
    b_high = tl.zeros_like(o_t) + B
    for _ in range(halvings):
        b_middle = (b_low + b_high + 1) // 2
        m_right = tl.load(p_cu + b_middle).to(tl.int64) <= o_t
        b_low = tl.where(m_right, b_middle, b_low)
        b_high = tl.where(m_right, b_high, b_middle - 1)
    return b_low


def halvings(batch: int) -> int:
    """Steps that `sequence_of` needs."""
    return batch.bit_length()


def on_device(x: Tensor) -> Any:
    """Launches go to the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is not under n."""
    return 1 << (n - 1).bit_length()
