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
def words(rows, o_row, m_row, i_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stretch i_d of some rows, as words of 32 bits: two channels each, or one of float32. Each of
    two comes out of its word in one instruction."""
    PER: tl.constexpr = 32 // rows.dtype.element_ty.primitive_bitwidth
    o_w = i_d.to(tl.int32) * (BLOCK_D // PER) + tl.arange(0, BLOCK_D // PER)
    m_w = m_row[:, None] & (o_w * PER < D)[None, :]
    if D % BLOCK_D == 0:
        m_w = tl.broadcast_to(m_row[:, None], [m_row.shape[0], BLOCK_D // PER])
    p_words = rows.to(tl.pointer_type(tl.int32))
    return tl.load(p_words + o_row[:, None] * (D // PER) + o_w[None, :], mask=m_w, other=0)


@triton.jit
def row(b_words, k: tl.constexpr, DTYPE: tl.constexpr):
    """Row k of `words` in float32. One warp holds whole rows: nothing is added or moved."""
    m_row = (tl.arange(0, b_words.shape[0]) == k)[:, None]
    b_row = tl.sum(tl.where(m_row, b_words, 0), axis=0)
    if DTYPE == tl.float32:  # noqa: SIM300
        b_x = b_row.to(tl.float32, bitcast=True)
    else:
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            b_even = (b_row << 16).to(tl.float32, bitcast=True)
            b_odd = (b_row & -65536).to(tl.float32, bitcast=True)
        else:
            b_even = b_row.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
            b_odd = (b_row >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        b_x = tl.reshape(tl.join(b_even, b_odd), [2 * b_row.shape[0]])
    return b_x
