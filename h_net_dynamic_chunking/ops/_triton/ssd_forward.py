"""The state-space recurrence forward: each program walks a segment, the state in its registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import launch
from h_net_dynamic_chunking.ops._triton.ssd_chunks import (
    Chunks,
    at_or_before,
    divide,
    fitting,
    live_positions,
    precision,
)
from h_net_dynamic_chunking.ops._triton.ssd_states import segment_states

# To be measured. Positions of a chunk, and how many programs a walk should have.
CHUNK, WARPS, STAGES = 64, 4, 2
PROGRAMS = 2048
# Positions of a segment: a multiple of the first, which the size of every chunk divides.
SEGMENT, LONGEST = 128, 2048


@triton.jit(do_not_specialize=["length", "chunks", "segments", "span", "batch"])
def ssd_forward_kernel(
    x,
    B,
    C,
    D,
    dt,
    decay,
    start,
    cu,
    entering,
    y,
    length,
    chunks,
    segments,
    span,
    batch,
    SX: tl.constexpr,
    SB: tl.constexpr,
    SC: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    PACKED: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    i_h, i_rs = i_program % H, i_program // H
    i_row, i_s = i_rs // segments, (i_rs % segments).to(tl.int32)
    first, last = i_s * span, tl.minimum(i_s * span + span, chunks)
    live = live_positions(cu, batch, length, PACKED)
    o_l, o_p, o_n = tl.arange(0, L), tl.arange(0, P), tl.arange(0, N)
    dtype = x.dtype.element_ty
    b_D = tl.load(D + i_h).to(tl.float32)
    p_entering = entering + (i_rs * H + i_h) * (N * P)
    b_state = tl.load(p_entering + o_n[:, None] * P + o_p[None, :])
    for i_c in tl.range(first, last, num_stages=STAGES):
        i_rc = i_row * chunks + i_c
        o_t = i_c * L + o_l
        m_t = (o_t < live)[:, None]
        row = i_row * length + i_c * L
        p_x, p_B, p_C = x + row * SX + i_h * P, B + row * SB, C + row * SC
        b_x = tl.load(p_x + o_l[:, None] * SX + o_p[None, :], mask=m_t, other=0)
        b_B = tl.load(p_B + o_l[:, None] * SB + o_n[None, :], mask=m_t, other=0)
        b_C = tl.load(p_C + o_l[:, None] * SC + o_n[None, :], mask=m_t, other=0)
        p_vector = (i_rc * H + i_h) * L
        b_dt, b_a = tl.load(dt + p_vector + o_l), tl.load(decay + p_vector + o_l)
        a_last = tl.load(decay + p_vector + L - 1)
        b_start = tl.load(start + i_rc * L + o_l)
        start_last = tl.load(start + i_rc * L + L - 1)

        # Every position reads the state that its chunk was entered with, if it is its sequence's,
        b_enter = tl.where(b_start < i_c * L, tl.exp2(b_a), 0.0)
        b_y = tl.dot(b_C, b_state.to(dtype), input_precision=PRECISION) * b_enter[:, None]
        b_y += b_D * b_x.to(tl.float32)
        # and position j <= i of its sequence.
        m_pair = (o_t[None, :] <= o_t[:, None]) & (o_t[None, :] >= b_start[:, None])
        b_w = tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION) * at_or_before(b_a)
        b_w = tl.where(m_pair, b_w * b_dt[None, :], 0.0)
        b_y = tl.dot(b_w.to(dtype), b_x, b_y, input_precision=PRECISION)
        p_y = y + row * (H * P) + i_h * P
        p_y += o_l[:, None] * (H * P) + o_p[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=(o_t < length)[:, None])

        gate = tl.where(start_last < i_c * L, tl.exp2(a_last), 0.0)
        b_leave = tl.where(o_t >= start_last, b_dt * tl.exp2(a_last - b_a), 0.0)
        b_v = (b_x.to(tl.float32) * b_leave[:, None]).to(dtype)
        b_state = tl.dot(tl.trans(b_B), b_v, b_state * gate, input_precision=PRECISION)


def span_of(divided: Chunks) -> int:
    """Chunks of a segment: few segments, whose states go through memory, but enough programs.

    In positions it does not depend on the size of the chunks.
    """
    wanted = divided.rows * divided.length * divided.heads // PROGRAMS
    return max(SEGMENT, min(wanted // SEGMENT * SEGMENT, LONGEST)) // divided.size


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
    """y (total, heads, P), and what entered each segment, for `ssd_bwd`.

    x:              (total, heads, P), total = rows * length; any stride between positions, the rest
                    contiguous
    dt:             (total, heads), likewise
    A, D:           (heads,)
    B, C:           (total, N), as x
    cu:             cumulative lengths of the sequences if rows is 1, or None
    initial, final: (rows, heads, N, P), float32: the state before, and (written) behind each row
    """
    total, heads, P = x.shape
    size, stages = fitting(x.dtype, CHUNK, STAGES)
    divided = divide(dt, A, cu, rows, size, continues=initial is not None)
    span = span_of(divided)
    entering = segment_states(x, B, divided, span, back=False, initial=initial, final=final)
    y = torch.empty(total, heads, P, dtype=x.dtype, device=x.device)
    segments = triton.cdiv(divided.chunks, span)
    launch(
        ssd_forward_kernel,
        rows * segments * heads,
        {
            "x": x,
            "B": B,
            "C": C,
            "D": D,
            **divided.tensors,
            "entering": entering,
            "y": y,
            "length": divided.length,
            "chunks": divided.chunks,
            "segments": segments,
            "span": span,
            "batch": divided.batch,
        },
        {
            "SX": x.stride(0),
            "SB": B.stride(0),
            "SC": C.stride(0),
            "P": P,
            "N": B.shape[1],
            "PRECISION": precision(x.dtype),
            "STAGES": stages,
            **divided.constants,
        },
        num_warps=WARPS,
    )
    return y, entering
