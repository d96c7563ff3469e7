"""What a walk in one warp knows of the positions around it, and the rows that it takes from them.

What a few positions need that is no vector is held by a lane. The vectors come through shared
memory, into which Triton copies what a loop with `num_stages` loads ahead of its use. In registers
they would not be ahead: all loads of a loop that has branches share one counter, and whoever wants
the first waits for the last (ptxas of Triton 3.6; half of all stalls on an H200).
"""

# Unrolled loops fill tuples, whose type then changes.
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl


@triton.jit
def about_positions(p, chunk, starts, i_first, i_stop, SMOOTH: tl.constexpr, ROWS: tl.constexpr):
    """Of the positions from i_first on, ROWS a lane: the chunk before them; by position its chunk,
    -1 from i_stop on, and the bits of its P; and one bit each: whether it begins a sequence."""
    o_t = i_first + tl.arange(0, 32) * ROWS
    b_before = tl.load(chunk + o_t - 1, mask=(o_t > 0) & (o_t <= i_stop), other=-1).to(tl.int32)
    b_begins = tl.zeros([32], tl.int32)
    b_chunks, b_ps = (), ()
    for k in tl.static_range(ROWS):
        m_t = o_t + k < i_stop
        b_chunk = tl.load(chunk + o_t + k, mask=m_t, other=-1).to(tl.int32)
        b_chunks += (b_chunk,)
        if SMOOTH:
            m_begins = tl.load(starts + o_t + k, mask=m_t, other=0) != 0
            b_begins |= tl.where(m_begins, 1 << k, 0)
            # In the tail it may be NaN.
            b_p = tl.where(b_chunk >= 0, tl.load(p + o_t + k, mask=m_t, other=1), 1.0)
            b_ps += (b_p.to(tl.int32, bitcast=True),)
    return b_before, b_chunks, b_ps, b_begins


@triton.jit
def of_lane(b_x, lane):
    """The integer that a lane holds, for all."""
    return tl.sum(tl.where(tl.arange(0, 32) == lane, b_x, 0), axis=0)


@triton.jit
def chunks_of_lane(b_before, b_chunks, lane, ROWS: tl.constexpr):
    """The chunk before the positions of a lane, and theirs: ROWS + 1 numbers."""
    i_chunks = (of_lane(b_before, lane),)
    for k in tl.static_range(ROWS):
        i_chunks += (of_lane(b_chunks[k], lane),)
    return i_chunks


@triton.jit
def as_vector(numbers, first: tl.constexpr, ROWS: tl.constexpr):
    """ROWS of the numbers, from `first` on."""
    o = tl.arange(0, ROWS)
    b_x = tl.zeros([ROWS], tl.int32)
    for k in tl.static_range(ROWS):
        b_x = tl.where(o == k, numbers[first + k], b_x)
    return b_x


@triton.jit
def row(b_tile, k: tl.constexpr):
    """Row k, bit by bit: one warp holds whole rows, so that nothing is added or moved."""
    bits: tl.constexpr = tl.int16 if b_tile.dtype.primitive_bitwidth == 16 else tl.int32
    m_row = (tl.arange(0, b_tile.shape[0]) == k)[:, None]
    b_row = tl.sum(tl.where(m_row, b_tile.to(bits, bitcast=True), 0), axis=0)
    return b_row.to(bits).to(b_tile.dtype, bitcast=True)
