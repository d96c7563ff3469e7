"""States of the recurrence at the edges of segments and of chunks, forward and back.

    forward:   S_after = decay S_before + sum over j of B_j (dt_j decay_j x_j)^T        (N, P)
    back:      G_before = decay G_after + sum over i of C_i (decay_i dy_i)^T

Each program walks a segment with the state in registers. Once from zero: what the segment adds.
Then a short walk over the segments gives the state that enters each. A row of one segment needs
neither: zeros enter it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch
from h_net_dynamic_chunking.ops._triton.ssd_chunks import (
    Chunks,
    live_positions,
    precision,
    stages,
)

# 65536 positions, 32 heads of 64, d_state 128, bfloat16, H200: a walk that stores what enters each
# chunk takes 0.20 ms; with 3 stages or with 8 warps as long.
WARPS, STAGES = 4, 2
# How many segments of heads there should be. For more, forward and backward took longer by 1% at
# 512, 5% at 1024 and 11% at 2048: more states of segments go through memory.
PROGRAMS = 256
_BLOCK = 512


@triton.jit(do_not_specialize=["length", "chunks", "segments", "span", "batch"])
def ssd_states_kernel(
    values,
    keys,
    dt,
    decay,
    start,
    cu,
    entering,
    passed,
    states,
    final,
    length,
    chunks,
    segments,
    span,
    batch,
    SV: tl.constexpr,
    SK: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BACK: tl.constexpr,
    EACH: tl.constexpr,
    ENTERED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    PACKED: tl.constexpr,
):
    """EACH: from what enters the segment, zeros if not ENTERED, store what enters each chunk and,
    FINAL, what leaves the last. Else, from zero, store what leaves the segment, and how much of
    what enters passes. INITIAL: what enters is (P, N), as is what leaves the last, which may take
    its place."""
    i_program = tl.program_id(0).to(tl.int64)
    i_h, i_rs = i_program % H, i_program // H
    i_row, i_s = i_rs // segments, (i_rs % segments).to(tl.int32)
    first, last = i_s * span, tl.minimum(i_s * span + span, chunks)
    live = live_positions(cu, batch, length, PACKED)
    o_l, o_p, o_n = tl.arange(0, L), tl.arange(0, P), tl.arange(0, N)
    o_state = o_n[:, None] * P + o_p[None, :]
    o_outside = o_p[None, :] * N + o_n[:, None]
    p_entering = entering + (i_rs * H + i_h) * (N * P)
    if INITIAL:
        p_entering += o_outside
    else:
        p_entering += o_state
    b_state = tl.zeros([N, P], tl.float32)
    if ENTERED:
        b_state += tl.load(p_entering)
    through = 1.0
    for i in tl.range(0, last - first, num_stages=STAGES):
        i_c = first + i
        if BACK:
            i_c = last - 1 - i
        i_rc = i_row * chunks + i_c
        o_t = i_c * L + o_l
        m_t = (o_t < live)[:, None]
        row = i_row * length + i_c * L
        p_v, p_k = values + row * SV + i_h * P, keys + row * SK
        b_v = tl.load(p_v + o_l[:, None] * SV + o_p[None, :], mask=m_t, other=0)
        b_k = tl.load(p_k + o_l[:, None] * SK + o_n[None, :], mask=m_t, other=0)
        p_decay = decay + (i_rc * H + i_h) * L
        b_a, a_last = tl.load(p_decay + o_l), tl.load(p_decay + L - 1)
        start_last = tl.load(start + i_rc * L + L - 1)
        gate = tl.where(start_last < i_c * L, tl.exp2(a_last), 0.0)
        if BACK:
            b_start = tl.load(start + i_rc * L + o_l)
            b_w = tl.where(b_start < i_c * L, tl.exp2(b_a), 0.0)
        else:
            b_dt = tl.load(dt + (i_rc * H + i_h) * L + o_l)
            b_w = tl.where(o_t >= start_last, b_dt * tl.exp2(a_last - b_a), 0.0)
        if EACH:
            p_state = states + (i_rc * H + i_h) * (N * P) + o_state
            tl.store(p_state, b_state.to(states.dtype.element_ty))
        b_v = (b_v.to(tl.float32) * b_w[:, None]).to(values.dtype.element_ty)
        b_state = tl.dot(tl.trans(b_k), b_v, b_state * gate, input_precision=PRECISION)
        through *= gate
    if not EACH:
        tl.store(p_entering, b_state)
        tl.store(passed + i_rs * H + i_h, through)
    if FINAL:
        # In the place of what entered, which other threads read.
        tl.debug_barrier()
        if i_s == segments - 1:
            tl.store(final + (i_row * H + i_h) * (N * P) + o_outside, b_state)


@triton.jit(do_not_specialize=["segments"])
def ssd_carry_kernel(
    states,
    passed,
    initial,
    segments,
    H: tl.constexpr,
    P: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BACK: tl.constexpr,
    INITIAL: tl.constexpr,
):
    """In place: from what each segment adds to what enters it. INITIAL: the first, by (P, N)."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_h = i_program // H, i_program % H
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_state = tl.zeros([BLOCK], tl.float32)
    if INITIAL:
        b_state += tl.load(initial + i_program * SIZE + (o % P) * (SIZE // P) + o // P)
    # Four at a time are on their way.
    for i in range(0, segments, 4):
        b_0, gate_0, p_0, m_0 = _segment(states, passed, i_row, i, i_h, o, segments, H, SIZE, BACK)
        b_1, gate_1, p_1, m_1 = _segment(
            states, passed, i_row, i + 1, i_h, o, segments, H, SIZE, BACK
        )
        b_2, gate_2, p_2, m_2 = _segment(
            states, passed, i_row, i + 2, i_h, o, segments, H, SIZE, BACK
        )
        b_3, gate_3, p_3, m_3 = _segment(
            states, passed, i_row, i + 3, i_h, o, segments, H, SIZE, BACK
        )
        tl.store(p_0, b_state, mask=m_0)
        b_state = b_state * gate_0 + b_0
        tl.store(p_1, b_state, mask=m_1)
        b_state = b_state * gate_1 + b_1
        tl.store(p_2, b_state, mask=m_2)
        b_state = b_state * gate_2 + b_2
        tl.store(p_3, b_state, mask=m_3)
        b_state = b_state * gate_3 + b_3


@triton.jit
def _segment(
    states,
    passed,
    i_row,
    i,
    i_h,
    o,
    segments,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    BACK: tl.constexpr,
):
    """What the i-th segment of the walk adds, how much passes it, where that stands, and whether
    there is one; if not, it adds nothing and everything passes."""
    m_s = tl.zeros_like(o) + i < segments
    i_s = tl.minimum(i, segments - 1)
    if BACK:
        i_s = segments - 1 - i_s
    i_rsh = (i_row * segments + i_s) * H + i_h
    p_state = states + i_rsh * SIZE + o
    b_state = tl.load(p_state, mask=m_s, other=0)
    return b_state, tl.where(m_s, tl.load(passed + i_rsh), 1.0), p_state, m_s


def span_of(divided: Chunks) -> int:
    """Chunks of a segment: few segments, whose states go through memory, but enough programs."""
    segments = max(1, PROGRAMS // max(1, divided.rows * divided.heads))
    return max(1, -(-divided.chunks // segments))


def segments_of(divided: Chunks) -> int:
    """Of a row. One without positions has one too, which passes on what enters it."""
    return max(1, -(-divided.chunks // span_of(divided)))


def segment_states(
    values: Tensor, keys: Tensor, divided: Chunks, *, back: bool, initial: Tensor | None = None
) -> Tensor | None:
    """What enters each segment: (rows * segments, heads, N, P), float32; None for one a row.

    values:     (total, heads, P), of any stride between positions
    keys:       (total, N), likewise
    initial:    (rows, heads, P, N), float32: what enters the first; None for zeros
    """
    segments = segments_of(divided)
    if segments == 1:
        return None
    heads, (P, N) = divided.heads, (values.shape[-1], keys.shape[-1])
    entering = values.new_empty(divided.rows * segments, heads, N, P, dtype=torch.float32)
    passed = entering.new_empty(divided.rows * segments, heads)
    _walk(values, keys, divided, back, entering=entering, passed=passed)
    block = min(_BLOCK, N * P)
    launch(
        ssd_carry_kernel,
        (divided.rows * heads, cdiv(N * P, block)),
        {
            "states": entering,
            "passed": passed,
            "initial": entering if initial is None else initial,
            "segments": segments,
        },
        {
            "H": heads,
            "P": P,
            "SIZE": N * P,
            "BLOCK": block,
            "BACK": back,
            "INITIAL": initial is not None,
        },
        num_warps=4,
    )
    return entering


def chunk_states(
    values: Tensor,
    keys: Tensor,
    divided: Chunks,
    entering: Tensor | None,
    *,
    back: bool,
    initial: Tensor | None = None,
    final: Tensor | None = None,
) -> Tensor:
    """What enters each chunk, from what enters each segment: (rows * chunks, heads, N, P).

    Going back, a chunk is entered from behind. In the dtype of the values.

    entering:  of `segment_states` with the same `initial`
    final:     (rows, heads, P, N), float32: (written) what leaves the last chunk; may be `initial`
    """
    shape = divided.rows * divided.chunks, divided.heads, keys.shape[-1], values.shape[-1]
    states = values.new_empty(shape)
    one_segment = entering is None
    _walk(
        values,
        keys,
        divided,
        back,
        entering=initial if one_segment else entering,
        is_initial=one_segment and initial is not None,
        states=states,
        final=final,
    )
    return states


def _walk(
    values: Tensor,
    keys: Tensor,
    divided: Chunks,
    back: bool,
    *,
    entering: Tensor | None,
    is_initial: bool = False,
    passed: Tensor | None = None,
    states: Tensor | None = None,
    final: Tensor | None = None,
) -> None:
    """With `states`, what enters each chunk; without, what leaves each segment and what passes."""
    segments = segments_of(divided)
    launch(
        ssd_states_kernel,
        divided.rows * segments * divided.heads,
        {
            "values": values,
            "keys": keys,
            **divided.tensors,
            # What is None is not touched: dt stands in its place.
            **{
                name: divided.dt if tensor is None else tensor
                for name, tensor in (
                    ("entering", entering),
                    ("passed", passed),
                    ("states", states),
                    ("final", final),
                )
            },
            "length": divided.length,
            "chunks": divided.chunks,
            "segments": segments,
            "span": span_of(divided),
            "batch": divided.batch,
        },
        {
            "SV": values.stride(0),
            "SK": keys.stride(0),
            "P": values.shape[-1],
            "N": keys.shape[-1],
            "BACK": back,
            "EACH": states is not None,
            "ENTERED": states is not None and entering is not None,
            "INITIAL": is_initial,
            "FINAL": final is not None,
            "PRECISION": precision(values.dtype),
            "STAGES": stages(values.dtype, STAGES),
            **divided.constants,
        },
        num_warps=WARPS,
    )
