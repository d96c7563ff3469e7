"""A copy with zeros behind the last sequence. PyTorch's `where` with a mask of rows, which it does
not read in vectors, takes 0.17 ms for the 134 MB of 65536 rows of 1024 (H200)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch

_BLOCK = 4096


@triton.jit(do_not_specialize=["numbers", "B"])
def zero_tail_kernel(x, cu, out, numbers, B, D: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numbers
    live = tl.load(cu + B).to(tl.int64) * D
    tl.store(out + o, tl.load(x + o, mask=m & (o < live), other=0), mask=m)


def zero_tail(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Of contiguous x (total, ...), of any dtype."""
    out = torch.empty_like(x)
    launch(
        zero_tail_kernel,
        cdiv(x.numel(), _BLOCK),
        {
            "x": x,
            "cu": cu_seqlens.contiguous(),
            "out": out,
            "numbers": x.numel(),
            "B": len(cu_seqlens) - 1,
        },
        {"D": x[0].numel(), "BLOCK": _BLOCK},
        num_warps=8,
    )
    return out
