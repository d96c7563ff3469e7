"""Rows by index, zeros where the index is -1: compaction, and its backward pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch, power_of_2

# Rows are moved, not computed with: a dtype that Triton may not know goes as the integer of its
# size. The usual ones go as they are, which saves two views.
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_USUAL = (torch.bfloat16, torch.float16, torch.float32, torch.int64)


@triton.jit(do_not_specialize=["M"])
def gather_kernel(
    x,
    index,
    out,
    count,
    M,
    COUNTED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m = o_m < M
    if COUNTED:
        m_m &= o_m < tl.load(count)
    b_row = tl.load(index + o_m, mask=m_m, other=-1)
    m_d = (o_d < D)[None, :]
    m_read = (b_row >= 0)[:, None] & m_d
    b_x = tl.load(x + b_row[:, None] * D + o_d[None, :], mask=m_read, other=0)
    tl.store(out + o_m[:, None] * D + o_d[None, :], b_x, mask=m_m[:, None] & m_d)


def gather(
    x: Tensor, index: Tensor, count: Tensor | None = None, room: int | None = None
) -> Tensor:
    """`x[index]` for x (rows, dim) of any dtype, with rows of zeros where the index is -1.

    `count`, int64, starts with how many entries of the index are valid: the rows behind stay as
    they are. `room` is how many entries are looked at, if that is less than there are.
    """
    x, index = x.contiguous(), index.contiguous()
    rows, dim = index.shape[0], x.shape[1]
    rows = rows if room is None else min(rows, room)
    out = x.new_empty(rows, dim)
    if out.numel() == 0:
        return out
    moved_x, moved_out = x, out
    if x.dtype not in _USUAL:
        integer = _INTEGER_OF_SIZE[x.element_size()]
        moved_x, moved_out = x.detach().view(integer), out.view(integer)
    block_d = min(power_of_2(dim), 1024)
    block_m = max(1, min(256, 4096 // block_d))
    launch(
        gather_kernel,
        (cdiv(rows, block_m), cdiv(dim, block_d)),
        {
            "x": moved_x,
            "index": index,
            "out": moved_out,
            "count": index if count is None else count,
            "M": rows,
        },
        {"COUNTED": count is not None, "D": dim, "BLOCK_M": block_m, "BLOCK_D": block_d},
        num_warps=4,
    )
    return out
