"""Places of packed positions in padded rows, and back: one launch for what torch takes a dozen.

Of chunks also before the host knows how many there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch

_BLOCK = 512


@triton.jit
def _positions_in(cu, o_i, length, B):
    """The position in each place, whether that is a place, and whether there is a position."""
    o_b = o_i // length
    m_i = o_b < B
    o_t = tl.load(cu + o_b, mask=m_i, other=0).to(tl.int64) + o_i % length
    m_t = m_i & (o_t < tl.load(cu + o_b + 1, mask=m_i, other=0).to(tl.int64))
    return o_t, m_i, m_t


@triton.jit(do_not_specialize=["B", "length", "T"])
def places_kernel(cu, places, inverse, B, length, T, BLOCK: tl.constexpr):
    """A program takes places, and its share of the tail."""
    i_p = tl.program_id(0).to(tl.int64)
    o_i = i_p * BLOCK + tl.arange(0, BLOCK)
    o_t, m_i, m_t = _positions_in(cu, o_i, length, B)
    tl.store(inverse + o_i, tl.where(m_t, o_t, -1), mask=m_i)
    tl.store(places + o_t, o_i, mask=m_t & (o_t < T))
    i_tail = tl.load(cu + B).to(tl.int64)
    for i_t in range(i_tail + i_p * BLOCK, T, tl.num_programs(0) * BLOCK):
        o_t = i_t + tl.arange(0, BLOCK)
        tl.store(places + o_t, tl.full([BLOCK], -1, tl.int64), mask=o_t < T)


@triton.jit(do_not_specialize=["B", "room"])
def chunk_places_kernel(
    cu, positions, sizes, places, inverse, opens, count, B, room, BLOCK: tl.constexpr
):
    """The places of chunks, as many as there is room for, and the position that opens each."""
    i_p = tl.program_id(0).to(tl.int64)
    o_i = i_p * BLOCK + tl.arange(0, BLOCK)
    length = tl.maximum(tl.load(sizes + 1), 1)
    o_c, m_i, m_c = _positions_in(cu, o_i, length, B)
    m_i &= o_i < room
    m_c &= o_i < room
    tl.store(inverse + o_i, tl.where(m_c, o_c, -1), mask=m_i)
    tl.store(opens + o_i, tl.load(positions + o_c, mask=m_c, other=-1), mask=m_i)
    # Pads only push a chunk back, so that its number is under that of its place.
    tl.store(places + o_c, o_i, mask=m_c)
    if i_p == 0:
        tl.store(count, B * length)


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


def places_of_chunks(
    cu_chunks: Tensor, positions: Tensor, sizes: Tensor, room: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Places of the chunks, their inverse, the position that opens the chunk in each place, all
    int64 (room,), of which the number of places is valid; and that, int64 (1,)."""
    places, inverse, opens = (cu_chunks.new_empty(room) for _ in range(3))
    count, batch = cu_chunks.new_empty(1), cu_chunks.shape[0] - 1
    launch(
        chunk_places_kernel,
        cdiv(room, _BLOCK),
        {
            "cu": cu_chunks,
            "positions": positions,
            "sizes": sizes,
            "places": places,
            "inverse": inverse,
            "opens": opens,
            "count": count,
            "B": batch,
            "room": room,
        },
        {"BLOCK": _BLOCK},
        num_warps=4,
    )
    return places, inverse, opens, count
