"""Places of packed positions in padded rows, and back: one launch for what torch takes a dozen."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch

_BLOCK = 512


@triton.jit(do_not_specialize=["B", "length", "T"])
def places_kernel(cu, places, inverse, B, length, T, BLOCK: tl.constexpr):
    """A program takes places, and its share of the tail."""
    i_p = tl.program_id(0).to(tl.int64)
    o_i = i_p * BLOCK + tl.arange(0, BLOCK)
    o_b = o_i // length
    m_i = o_b < B
    o_t = tl.load(cu + o_b, mask=m_i, other=0).to(tl.int64) + o_i % length
    m_t = m_i & (o_t < tl.load(cu + o_b + 1, mask=m_i, other=0).to(tl.int64))
    tl.store(inverse + o_i, tl.where(m_t, o_t, -1), mask=m_i)
    tl.store(places + o_t, o_i, mask=m_t & (o_t < T))
    i_tail = tl.load(cu + B).to(tl.int64)
    for i_t in range(i_tail + i_p * BLOCK, T, tl.num_programs(0) * BLOCK):
        o_t = i_t + tl.arange(0, BLOCK)
        tl.store(places + o_t, tl.full([BLOCK], -1, tl.int64), mask=o_t < T)


def padded_places(cu_seqlens: Tensor, length: int, total: int) -> tuple[Tensor, Tensor]:
    """The results of the operation `h_net::padded_places`; there must be places."""
    cu, batch = cu_seqlens.contiguous(), cu_seqlens.shape[0] - 1
    inverse = cu.new_empty(batch * length, dtype=torch.int64)
    places = inverse.new_empty(total)
    launch(
        places_kernel,
        cdiv(batch * length, _BLOCK),
        {"cu": cu, "places": places, "inverse": inverse, "B": batch, "length": length, "T": total},
        {"BLOCK": _BLOCK},
        num_warps=4,
    )
    return places, inverse
