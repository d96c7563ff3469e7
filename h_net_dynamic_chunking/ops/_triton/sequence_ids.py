"""Which sequence each position is in, for kernels that walk down the positions."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, halvings, launch, sequence_of

_BLOCK = 256


@triton.jit(do_not_specialize=["T", "B", "steps"])
def sequence_ids_kernel(cu, sequence, T, B, steps, BLOCK: tl.constexpr):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sequence + o_t, sequence_of(cu, o_t, B, steps).to(tl.int32), mask=o_t < T)


def sequence_ids(cu_seqlens: Tensor, total: int) -> tuple[Tensor, int]:
    """Int32 (total,), the sequence of each position, `batch` in the tail; and `batch`."""
    batch = len(cu_seqlens) - 1
    sequence = torch.empty(total, dtype=torch.int32, device=cu_seqlens.device)
    launch(
        sequence_ids_kernel,
        cdiv(total, _BLOCK),
        {
            "cu": cu_seqlens.contiguous(),
            "sequence": sequence,
            "T": total,
            "B": batch,
            "steps": halvings(batch),
        },
        {"BLOCK": _BLOCK},
        num_warps=4,
    )
    return sequence, batch
