"""What comes into a block of positions from those behind it, backwards.

    v_t = grad_t + a_{t+1} v_{t+1}        a: 1 within a chunk, its gate where one opens

Where the memory is short, the walk over the block begins behind it, as far as anything is felt.
Else a kernel says of each block what it passes on, and how much passes it, as in `walk`.
"""

import triton
import triton.language as tl

from h_net_dynamic_chunking.ops._triton.tiles import (
    about_positions,
    as_vector,
    chunks_of_lane,
    of_lane,
    row,
    words,
)
from h_net_dynamic_chunking.ops._triton.walk import clamped, counts, opening, program


@triton.jit
def gates_into(p, chunk, starts, o_t, m_t, low, high, SMOOTH: tl.constexpr):
    """How much of the gradient of positions t, above 0, reaches the positions before them."""
    b_chunk = tl.load(chunk + o_t, mask=m_t, other=-1)
    b_before = tl.load(chunk + o_t - 1, mask=m_t, other=-1)
    _, b_gate = opening(p, starts, o_t, m_t, low, high, SMOOTH)
    return tl.where(b_chunk < 0, 0.0, tl.where(b_chunk == b_before, 1.0, b_gate))


@triton.jit
def passes(gate, b_v):
    """gate v. A gate of 0 lets nothing through, not even NaN."""
    return tl.where(gate == 0, 0.0, gate * b_v)


@triton.jit
def _reach(
    p, chunk, starts, i_stop, T, low, high, POSITIONS: tl.constexpr, NEGLIGIBLE: tl.constexpr
):
    """Up to where the positions from i_stop on are felt before it."""
    weight = tl.full([], 1.0, tl.float32)
    i_end = i_stop
    while (i_end < T) & counts(weight, NEGLIGIBLE):
        o_t = i_end + tl.arange(0, POSITIONS)
        # By the gates before its own: one of NaN is seen where it opens a chunk, and none behind.
        m_gates = (o_t > i_stop) & (o_t <= T)
        b_gate = gates_into(p, chunk, starts, o_t - 1, m_gates, low, high, True)
        b_gate = tl.where(m_gates & (b_gate == b_gate), b_gate, tl.where(m_gates, 0.0, 1.0))
        b_weight = weight * tl.cumprod(b_gate, axis=0)
        m_live = tl.load(chunk + o_t, mask=o_t < T, other=-1) >= 0
        m_counts = m_live & counts(b_weight, NEGLIGIBLE)
        i_end += tl.sum(m_counts.to(tl.int64), axis=0)
        # 0, which ends the loop, unless all that was looked at counts.
        m_last = m_counts & (tl.arange(0, POSITIONS) == POSITIONS - 1)
        weight = tl.sum(tl.where(m_last, b_weight, 0.0))
    return i_end


@triton.jit
def look_ahead(
    grad,
    p,
    chunk,
    starts,
    i_stop,
    T,
    i_d,
    low,
    high,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    POSITIONS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    """What of v at i_stop reaches the position before it: a walk from as far as is felt there."""
    b_v = tl.zeros([BLOCK_D], tl.float32)
    i_end = _reach(p, chunk, starts, i_stop, T, low, high, POSITIONS, NEGLIGIBLE)
    i_tile = i_stop + (i_end - i_stop) // (32 * ROWS) * (32 * ROWS)
    while i_tile >= i_stop:
        b_before, b_chunks, b_ps, b_begins = about_positions(
            p, chunk, starts, i_tile, i_end, True, ROWS
        )
        lanes = tl.cdiv(tl.minimum(i_end - i_tile, 32 * ROWS), ROWS).to(tl.int32)
        for i in tl.range(0, lanes, num_stages=STAGES):
            lane = lanes - 1 - i
            i_chunks = chunks_of_lane(b_before, b_chunks, lane, ROWS)
            begins = of_lane(b_begins, lane)
            m_t = as_vector(i_chunks, 1, ROWS) >= 0
            o_t = lane * ROWS + tl.arange(0, ROWS)
            b_gs = words(grad + i_tile * D, o_t, m_t, i_d, D, BLOCK_D)
            for k in tl.static_range(ROWS - 1, -1, -1):
                b_v += row(b_gs, k, grad.dtype.element_ty)
                if i_chunks[k + 1] != i_chunks[k]:
                    raw = of_lane(b_ps[k], lane).to(tl.float32, bitcast=True)
                    is_start = (begins >> k) & 1 != 0
                    b_v = passes(tl.where(is_start, 0.0, 1 - clamped(raw, low, high)), b_v)
        i_tile -= 32 * ROWS
    return b_v


@triton.jit(do_not_specialize=["T", "block"])
def begins_kernel(
    grad,
    p,
    chunk,
    starts,
    states,
    through,
    T,
    block,
    low,
    high,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    """What reaches the first position of each block from the block, and how much passes it."""
    i_b, i_d, o_d, m_d = program(D, BLOCK_D)
    i_start = i_b * block
    i_stop = tl.minimum(i_start + block, T)
    b_state = tl.zeros([BLOCK_D], dtype=tl.float32)
    weight = tl.full([], 1.0, tl.float32)
    i_t = i_start
    while (i_t < i_stop) & counts(weight, NEGLIGIBLE):
        o_t = i_t + tl.arange(0, ROWS)
        m_t = o_t < i_stop
        o_g = o_t[:, None] * D + o_d[None, :]
        b_g = tl.load(grad + o_g, mask=m_t[:, None] & m_d[None, :], other=0).to(tl.float32)
        m_inner = m_t & (o_t > i_start)
        b_gate = gates_into(p, chunk, starts, o_t, m_inner, low, high, SMOOTH)
        b_gate = tl.where(m_inner, b_gate, 1.0)
        m_nan = b_gate != b_gate
        b_weight = weight * tl.cumprod(tl.where(m_nan, 1.0, b_gate), axis=0)
        m_live = tl.load(chunk + o_t, mask=m_t, other=-1) >= 0
        m_counts = m_live & counts(b_weight, NEGLIGIBLE)
        b_state += tl.sum(tl.where(m_counts[:, None], b_weight[:, None] * b_g, 0.0), axis=0)
        weight = tl.sum(tl.where(tl.arange(0, ROWS) == ROWS - 1, b_weight, 0.0))
        # What passes a gate of NaN is NaN, and there is no more to be seen.
        if tl.sum((m_nan & m_counts).to(tl.int32)) > 0:
            b_state += float("nan")
            weight *= 0.0
        i_t += ROWS
    tl.store(states + i_b * D + o_d, b_state, mask=m_d)
    if i_d == 0:
        gate = gates_into(p, chunk, starts, i_stop, i_stop < T, low, high, SMOOTH)
        # A weight of 0 lets nothing through, not even NaN.
        m_passes = counts(weight, NEGLIGIBLE) & counts(weight * gate, NEGLIGIBLE)
        tl.store(through + i_b, tl.where(m_passes, weight * gate, 0.0))
