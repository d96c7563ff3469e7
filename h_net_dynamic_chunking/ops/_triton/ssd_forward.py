"""The state-space recurrence forward: the states that enter the chunks, then the outputs of each.

A program has half a chunk and walks over heads, with the products of B and C, which all heads
share, in its registers. A walk over the chunks of one head, with its state in registers, needs no
states in memory, but was slower: 0.76 ms in place of 0.71 (65536 positions, 32 heads of 64, d_state
128, bfloat16, H200).
"""

import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch
from h_net_dynamic_chunking.ops._triton.ssd_chunks import (
    Chunks,
    divide,
    live_positions,
    precision,
    stages,
)
from h_net_dynamic_chunking.ops._triton.ssd_states import chunk_states, segment_states

# Both halves of the shape above take 0.38 ms like this; with 1 or 2 stages 0.44, with 4 0.48.
WARPS, STAGES = 4, 3
# How many programs should have a part of the heads.
PROGRAMS = 2048


@triton.jit(do_not_specialize=["length", "chunks", "per_group", "batch"])
def ssd_output_kernel(
    x,
    B,
    C,
    D,
    dt,
    decay,
    start,
    cu,
    states,
    y,
    length,
    chunks,
    per_group,
    batch,
    SX: tl.constexpr,
    SB: tl.constexpr,
    SC: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    LATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    PACKED: tl.constexpr,
):
    """y of one half of the chunk; LATE: of the later one, which reads the early one too."""
    i_rc, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_row, i_c = i_rc // chunks, (i_rc % chunks).to(tl.int32)
    live = live_positions(cu, batch, length, PACKED)
    HALF: tl.constexpr = L // 2
    dtype = x.dtype.element_ty
    o_l, o_p, o_n = tl.arange(0, HALF), tl.arange(0, P), tl.arange(0, N)
    if LATE:
        o_l += HALF
    o_t = i_c * L + o_l
    m_t = (o_t < live)[:, None]
    row = i_row * length + i_c * L
    x, y, B, C = x + row * SX, y + row * (H * P), B + row * SB, C + row * SC
    b_start = tl.load(start + i_rc * L + o_l)
    m_enter = b_start < i_c * L
    b_C = tl.load(C + o_l[:, None] * SC + o_n[None, :], mask=m_t, other=0)
    b_B = tl.load(B + o_l[:, None] * SB + o_n[None, :], mask=m_t, other=0)
    m_pair = (o_t[None, :] <= o_t[:, None]) & (o_t[None, :] >= b_start[:, None])
    b_CB = tl.where(m_pair, tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION), 0.0)
    if LATE:
        m_early = (o_t - HALF < live)[:, None]
        b_B = tl.load(B + (o_l - HALF)[:, None] * SB + o_n[None, :], mask=m_early, other=0)
        b_early = tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION)
        b_early = tl.where((o_t - HALF)[None, :] >= b_start[:, None], b_early, 0.0).to(dtype)
    first = i_g * per_group
    for i_h in tl.range(first, tl.minimum(first + per_group, H), num_stages=STAGES):
        p_vector = (i_rc * H + i_h) * L + o_l
        p_x = x + i_h * P + o_p[None, :]
        b_x = tl.load(p_x + o_l[:, None] * SX, mask=m_t, other=0)
        b_S = tl.load(states + (i_rc * H + i_h) * (N * P) + o_n[:, None] * P + o_p[None, :])
        b_dt, b_a = tl.load(dt + p_vector), tl.load(decay + p_vector)

        # Every position reads the state that its chunk was entered with, if it is its sequence's,
        b_enter = tl.where(m_enter, tl.exp2(b_a), 0.0)
        b_y = tl.dot(b_C, b_S, input_precision=PRECISION) * b_enter[:, None]
        b_y += tl.load(D + i_h).to(tl.float32) * b_x.to(tl.float32)
        # the early half, by the decays to and from the edge between,
        if LATE:
            a_edge = tl.load(decay + (i_rc * H + i_h) * L + HALF - 1)
            b_before = tl.exp2(a_edge - tl.load(decay + p_vector - HALF))
            b_before *= tl.load(dt + p_vector - HALF)
            b_u = tl.load(p_x + (o_l - HALF)[:, None] * SX, mask=m_early, other=0)
            b_u = (b_u.to(tl.float32) * b_before[:, None]).to(dtype)
            b_read = tl.dot(b_early, b_u, input_precision=PRECISION)
            b_y += b_read * tl.exp2(b_a - a_edge)[:, None]
        # and its half. Where no pair is, the decay is held at 1 for infinity.
        b_E = tl.exp2(tl.minimum(b_a[:, None] - b_a[None, :], 0.0)) * b_dt[None, :]
        b_y = tl.dot((b_CB * b_E).to(dtype), b_x, b_y, input_precision=PRECISION)
        p_y = y + i_h * P + o_l[:, None] * (H * P) + o_p[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=(o_t < length)[:, None])


def ssd_fwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu: Tensor | None,
    rows: int = 1,
    *,
    initial: Tensor | None = None,
    final: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (total, heads, P), and what enters each chunk, (rows * chunks, heads, N, P), for `ssd_bwd`.

    Rows are faster than the same sequences packed, if their heads are enough for the device: then
    a row is one segment.

    x:              (total, heads, P), total = rows * length; any stride between positions, the rest
                    contiguous
    dt:             (total, heads), likewise
    A, D:           (heads,)
    B, C:           (total, N), as x
    cu:             cumulative lengths of the sequences if rows is 1, or None
    initial, final: (rows, heads, P, N), float32: the state before, and (written) behind each row;
                    may be one tensor
    """
    divided = divide(dt, A, cu, rows, x.dtype, continues=initial is not None)
    entering = segment_states(x, B, divided, back=False, initial=initial)
    states = chunk_states(x, B, divided, entering, back=False, initial=initial, final=final)
    y = x.new_empty(x.shape)
    for late in (True, False):
        _outputs(x, B, C, D, divided, states, y, late)
    return y, states


def _outputs(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    divided: Chunks,
    states: Tensor,
    y: Tensor,
    late: bool,
) -> None:
    blocks, heads = states.shape[:2]
    per_group = cdiv(heads, max(1, min(PROGRAMS // max(blocks, 1), heads)))
    launch(
        ssd_output_kernel,
        (blocks, cdiv(heads, per_group)),
        {
            "x": x,
            "B": B,
            "C": C,
            "D": D,
            **divided.tensors,
            "states": states,
            "y": y,
            "length": divided.length,
            "chunks": divided.chunks,
            "per_group": per_group,
            "batch": divided.batch,
        },
        {
            "SX": x.stride(0),
            "SB": B.stride(0),
            "SC": C.stride(0),
            "P": x.shape[2],
            "N": B.shape[1],
            "LATE": late,
            "PRECISION": precision(x.dtype),
            "STAGES": stages(x.dtype, STAGES),
            **divided.constants,
        },
        num_warps=WARPS,
    )
