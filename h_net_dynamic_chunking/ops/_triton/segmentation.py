"""Chunk numbers: count in blocks, add up, place. Three launches, four with a limit.

Without a limit the boundaries are numbered through, and that number is the chunk. With one, the
number of a boundary within its sequence decides, and the chunks are counted anew.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, halvings, launch, sequence_of

# 65536 positions make 32 blocks, and a program that adds up the counts of all blocks before it
# reads 512 of them even where there are a million positions.
_BLOCK = 2048
# Sequences that the single program of `sequences_kernel` takes at a time.
_SEQUENCES = 1024


@triton.jit(do_not_specialize=["T", "B", "steps"])
def count_kernel(
    asked,
    cu,
    starts,
    wanted,
    counts,
    T,
    B,
    steps,
    threshold,
    COMPARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mark the starts and what is asked for, and count the latter in each block."""
    i_b = tl.program_id(0).to(tl.int64)
    o_t = i_b * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < T
    i_sequence = sequence_of(cu, o_t, B, steps)
    b_start = (i_sequence < B) & (tl.load(cu + i_sequence).to(tl.int64) == o_t)
    b_asked = tl.load(asked + o_t, mask=m_t, other=0)
    b_asked = b_asked > threshold if COMPARE else b_asked != 0
    b_wanted = m_t & (i_sequence < B) & (b_asked | b_start)
    tl.store(starts + o_t, b_start, mask=m_t)
    tl.store(wanted + o_t, b_wanted, mask=m_t)
    tl.store(counts + i_b, tl.sum(b_wanted.to(tl.int64)))


@triton.jit(do_not_specialize=["T", "B"])
def number_kernel(
    wanted, counts, cu, number, slots, positions, T, B, PLACES: tl.constexpr, BLOCK: tl.constexpr
):
    """How many are wanted up to each position, less one: its chunk, if there is no limit."""
    i_b = tl.program_id(0).to(tl.int64)
    b_before = tl.zeros([BLOCK], dtype=tl.int64)
    for i_c in range(0, i_b, BLOCK):
        o_c = i_c + tl.arange(0, BLOCK)
        b_before += tl.load(counts + o_c, mask=o_c < i_b, other=0)
    o_t = i_b * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < T
    m_live = o_t < tl.load(cu + B).to(tl.int64)
    b_wanted = tl.load(wanted + o_t, mask=m_t, other=0) != 0
    b_number = tl.sum(b_before) + tl.cumsum(b_wanted.to(tl.int64), axis=0) - 1
    tl.store(number + o_t, tl.where(m_live, b_number, -1), mask=m_t)
    if PLACES:
        tl.store(slots + o_t, tl.where(b_wanted, b_number, -1), mask=m_t)
        tl.store(positions + b_number, o_t, mask=b_wanted)


@triton.jit(do_not_specialize=["B", "blocks", "limit"])
def sequences_kernel(
    number, counts, cu, before, cu_chunks, sizes, B, blocks, limit, BLOCK: tl.constexpr
):
    """Chunks before each sequence, wanted and kept; how many in all, and in the longest."""
    b_total = tl.zeros([BLOCK], dtype=tl.int64)
    for i_c in range(0, blocks, BLOCK):
        o_c = i_c + tl.arange(0, BLOCK)
        b_total += tl.load(counts + o_c, mask=o_c < blocks, other=0)
    total = tl.sum(b_total)
    live = tl.load(cu + B).to(tl.int64)
    kept = tl.zeros([], dtype=tl.int64)
    longest = tl.zeros([], dtype=tl.int64)
    for i_s in range(0, B, BLOCK):
        o_s = i_s + tl.arange(0, BLOCK)
        m_s = o_s < B
        b_from = tl.load(cu + o_s, mask=m_s, other=0).to(tl.int64)
        b_to = tl.load(cu + o_s + 1, mask=m_s, other=0).to(tl.int64)
        # The first position of a sequence opens a chunk, so its number counts those before.
        b_first = tl.load(number + b_from, mask=m_s & (b_from < live), other=0)
        b_first = tl.where(b_from < live, b_first, total)
        b_next = tl.load(number + b_to, mask=m_s & (b_to < live), other=0)
        b_next = tl.where(b_to < live, b_next, total)
        b_size = tl.where(m_s, tl.minimum(b_next - b_first, limit), 0)
        tl.store(before + o_s, b_first, mask=m_s)
        tl.store(cu_chunks + o_s + 1, kept + tl.cumsum(b_size, axis=0), mask=m_s)
        kept += tl.sum(b_size)
        longest = tl.maximum(longest, tl.max(b_size, axis=0))
    tl.store(cu_chunks, 0)
    tl.store(sizes, kept)
    tl.store(sizes + 1, longest)


@triton.jit(do_not_specialize=["T", "B", "steps", "limit"])
def limit_kernel(
    wanted,
    cu,
    before,
    cu_chunks,
    number,
    kept,
    slots,
    positions,
    T,
    B,
    steps,
    limit,
    BLOCK: tl.constexpr,
):
    """Turn numbers over all sequences into chunks, of which a sequence has `limit` at most."""
    i_b = tl.program_id(0).to(tl.int64)
    o_t = i_b * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < T
    i_sequence = sequence_of(cu, o_t, B, steps)
    m_live = m_t & (i_sequence < B)
    b_rank = tl.load(number + o_t, mask=m_live, other=0)
    b_rank -= tl.load(before + i_sequence, mask=m_live, other=0)
    b_chunk = tl.load(cu_chunks + i_sequence, mask=m_live, other=0)
    b_chunk += tl.minimum(b_rank, limit - 1)
    b_wanted = tl.load(wanted + o_t, mask=m_live, other=0) != 0
    b_kept = b_wanted & (b_rank < limit)
    tl.store(number + o_t, tl.where(m_live, b_chunk, -1), mask=m_t)
    tl.store(kept + o_t, b_kept, mask=m_t)
    tl.store(slots + o_t, tl.where(b_kept, b_chunk, -1), mask=m_t)
    tl.store(positions + b_chunk, o_t, mask=b_kept)


def segment(
    asked: Tensor, cu_seqlens: Tensor, max_chunks: int | None, threshold: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of the operation `h_net::segment`; with a threshold, of float32."""
    asked, cu = asked.contiguous(), cu_seqlens.contiguous()
    total, batch = asked.shape[0], cu.shape[0] - 1
    blocks, steps = cdiv(total, _BLOCK), halvings(batch)
    limited = max_chunks is not None
    wanted = torch.empty_like(asked, dtype=torch.bool)
    starts, kept = torch.empty_like(wanted), wanted.new_empty(total if limited else 0)
    number = torch.empty_like(asked, dtype=torch.int64)
    slots = torch.empty_like(number)
    positions = torch.empty_like(number)
    if max_chunks is not None:
        positions = number.new_full((batch * max_chunks,), -1)
    cu_chunks, sizes = number.new_empty(batch + 1), number.new_empty(2)
    counts, before = number.new_empty(blocks), number.new_empty(batch)
    lengths = {"T": total, "B": batch}
    launch(
        count_kernel,
        blocks,
        {
            "asked": asked,
            "cu": cu,
            "starts": starts,
            "wanted": wanted,
            "counts": counts,
            **lengths,
            "steps": steps,
            "threshold": 0.0 if threshold is None else float(threshold),
        },
        {"COMPARE": threshold is not None, "BLOCK": _BLOCK},
        num_warps=8,
    )
    launch(
        number_kernel,
        blocks,
        {
            "wanted": wanted,
            "counts": counts,
            "cu": cu,
            "number": number,
            "slots": slots,
            "positions": positions,
            **lengths,
        },
        {"PLACES": not limited, "BLOCK": _BLOCK},
        num_warps=8,
    )
    launch(
        sequences_kernel,
        1,
        {
            "number": number,
            "counts": counts,
            "cu": cu,
            "before": before,
            "cu_chunks": cu_chunks,
            "sizes": sizes,
            "B": batch,
            "blocks": blocks,
            "limit": max_chunks if limited else total,
        },
        {"BLOCK": _SEQUENCES},
        num_warps=4,
    )
    if limited:
        launch(
            limit_kernel,
            blocks,
            {
                "wanted": wanted,
                "cu": cu,
                "before": before,
                "cu_chunks": cu_chunks,
                "number": number,
                "kept": kept,
                "slots": slots,
                "positions": positions,
                **lengths,
                "steps": steps,
                "limit": max_chunks,
            },
            {"BLOCK": _BLOCK},
            num_warps=8,
        )
    return wanted, kept, starts, positions, number, slots, cu_chunks, sizes
