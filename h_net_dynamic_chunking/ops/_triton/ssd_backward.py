"""The gradients of the state-space recurrence.

With u_j = dt_j x_j, a the logarithm of the decay from before the chunk, E_ij = exp(a_i - a_j) for
j <= i in one sequence, S what enters the chunk and G the gradient of what leaves it:

    du_j  = sum over i of (C_i . B_j) E_ij dy_i  +  exp(a_last - a_j) G^T B_j
    dC_i  = sum over heads, j of E_ij (dy_i . u_j) B_j  +  exp(a_i) S dy_i
    dB_j  = sum over heads, i of E_ij (dy_i . u_j) C_i  +  exp(a_last - a_j) G u_j

The gradient of the logarithm of one decay, that of position k, sums over the pairs j < k <= i that
it stands between: pairs within the chunk, pairs that come from before it, pairs that go behind it,
and those that do both, which are exp(a_last) <S, G>. A program has a chunk and walks over heads,
with B, C and their gradients in its registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import launch, power_of_2
from h_net_dynamic_chunking.ops._triton.ssd_chunks import (
    Chunks,
    at_or_before,
    divide,
    live_positions,
    precision,
)
from h_net_dynamic_chunking.ops._triton.ssd_forward import CHUNK as FORWARD_CHUNK
from h_net_dynamic_chunking.ops._triton.ssd_forward import span_of
from h_net_dynamic_chunking.ops._triton.ssd_states import chunk_states, segment_states

# To be measured. Positions of a chunk, and how many programs should have a part of the heads.
CHUNK, WARPS, STAGES = 64, 8, 2
PROGRAMS = 512


@triton.jit(do_not_specialize=["length", "chunks", "total", "per_group", "batch"])
def ssd_backward_kernel(
    grad,
    x,
    B,
    C,
    D,
    dt,
    decay,
    start,
    cu,
    states,
    grad_states,
    grad_x,
    grad_B,
    grad_C,
    direct,
    inside,
    leaving,
    across,
    grad_D,
    length,
    chunks,
    total,
    per_group,
    batch,
    SG: tl.constexpr,
    SX: tl.constexpr,
    SB: tl.constexpr,
    SC: tl.constexpr,
    SGX: tl.constexpr,
    SGB: tl.constexpr,
    SGC: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Vectors of each chunk and head, (rows * chunks, H, L), for `ssd_decay_kernel`: direct, the
    gradient of dt in u; inside, of pairs that end at a position less those that begin there, but
    for those that begin there and leave the chunk, which are `leaving`. Scalars: `across`, of pairs
    that come and leave, and grad_D."""
    i_rc, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_row, i_c = i_rc // chunks, (i_rc % chunks).to(tl.int32)
    live = live_positions(cu, batch, length, PACKED)
    dtype = x.dtype.element_ty
    o_l, o_p, o_n = tl.arange(0, L), tl.arange(0, P), tl.arange(0, N)
    o_t = i_c * L + o_l
    m_t, m_row = (o_t < live)[:, None], (o_t < length)[:, None]
    o_row = (i_row * length + o_t)[:, None]
    b_start = tl.load(start + i_rc * L + o_l)
    start_last = tl.load(start + i_rc * L + L - 1)
    m_enter, m_leave, m_across = b_start < i_c * L, o_t >= start_last, start_last < i_c * L
    m_pair = (o_t[None, :] <= o_t[:, None]) & (o_t[None, :] >= b_start[:, None])
    m_same = o_l[None, :] == o_l[:, None]

    b_B = tl.load(B + o_row * SB + o_n[None, :], mask=m_t, other=0)
    b_C = tl.load(C + o_row * SC + o_n[None, :], mask=m_t, other=0)
    b_CB = tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION)
    b_CB = tl.where(m_pair, b_CB, 0.0)
    b_grad_CB = tl.zeros([L, L], tl.float32)
    b_grad_B = tl.zeros([L, N], tl.float32)
    b_grad_C = tl.zeros([L, N], tl.float32)
    o_state = o_n[:, None] * P + o_p[None, :]
    first = i_g * per_group
    for i_h in tl.range(first, tl.minimum(first + per_group, H), num_stages=STAGES):
        i_rch = i_rc * H + i_h
        o_x = i_h * P + o_p[None, :]
        b_g = tl.load(grad + o_row * SG + o_x, mask=m_t, other=0)
        b_x = tl.load(x + o_row * SX + o_x, mask=m_t, other=0)
        b_S = tl.load(states + i_rch * (N * P) + o_state)
        b_G = tl.load(grad_states + i_rch * (N * P) + o_state)
        b_dt, b_a = tl.load(dt + i_rch * L + o_l), tl.load(decay + i_rch * L + o_l)
        a_last = tl.load(decay + i_rch * L + L - 1)
        b_D = tl.load(D + i_h).to(tl.float32)
        b_enter = tl.where(m_enter, tl.exp2(b_a), 0.0)
        b_leave = tl.where(m_leave, tl.exp2(a_last - b_a), 0.0)
        b_g_wide, b_x_wide = b_g.to(tl.float32), b_x.to(tl.float32)

        b_E = at_or_before(b_a)
        b_gx = tl.dot(b_g, tl.trans(b_x), input_precision=PRECISION)
        b_w = b_CB * b_E
        b_du = tl.dot(b_B, b_G, input_precision=PRECISION) * b_leave[:, None]
        b_left = tl.sum(b_x_wide * b_du, axis=1)
        b_du = tl.dot(tl.trans(b_w.to(dtype)), b_g, b_du, input_precision=PRECISION)
        b_grad_x = b_du * b_dt[:, None] + b_D * b_g_wide
        p_grad_x = grad_x + o_row * SGX + o_x
        tl.store(p_grad_x, b_grad_x.to(grad_x.dtype.element_ty), mask=m_row)

        b_pairs = b_w * b_gx
        b_begin, b_end = tl.sum(b_pairs, axis=0), tl.sum(b_pairs * b_dt[None, :], axis=1)
        b_grad_CB += b_gx * b_E * b_dt[None, :]
        b_read = (b_g_wide * b_enter[:, None]).to(dtype)
        b_part = tl.dot(b_read, tl.trans(b_S), input_precision=PRECISION)
        b_end += tl.sum(b_part * b_C.to(tl.float32), axis=1)
        b_grad_C += b_part
        b_u = (b_x_wide * (b_leave * b_dt)[:, None]).to(dtype)
        b_grad_B = tl.dot(b_u, tl.trans(b_G), b_grad_B, input_precision=PRECISION)

        tl.store(direct + i_rch * L + o_l, b_begin + b_left)
        tl.store(inside + i_rch * L + o_l, b_end - b_dt * b_begin)
        tl.store(leaving + i_rch * L + o_l, b_dt * b_left)
        b_both = tl.sum(tl.sum(b_S.to(tl.float32) * b_G.to(tl.float32), axis=1), axis=0)
        tl.store(across + i_rch, tl.where(m_across, tl.exp2(a_last) * b_both, 0.0))
        tl.store(grad_D + i_rch, tl.sum(tl.sum(tl.where(m_same, b_gx, 0.0), axis=1), axis=0))

    b_grad_CB = tl.where(m_pair, b_grad_CB, 0.0).to(dtype)
    b_grad_C = tl.dot(b_grad_CB, b_B, b_grad_C, input_precision=PRECISION)
    b_grad_B = tl.dot(tl.trans(b_grad_CB), b_C, b_grad_B, input_precision=PRECISION)
    # Of several groups of heads each has a buffer of its own.
    o_row += i_g.to(tl.int64) * total
    p_grad_B, p_grad_C = grad_B + o_row * SGB + o_n[None, :], grad_C + o_row * SGC + o_n[None, :]
    tl.store(p_grad_B, b_grad_B.to(grad_B.dtype.element_ty), mask=m_row)
    tl.store(p_grad_C, b_grad_C.to(grad_C.dtype.element_ty), mask=m_row)


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_decay_kernel(
    dt,
    A,
    start,
    direct,
    inside,
    leaving,
    across,
    grad_dt,
    grad_A,
    length,
    chunks,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
):
    """Gradients of dt, and of A from each chunk, (rows * chunks, H)."""
    i_rc, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_row, i_c = i_rc // chunks, (i_rc % chunks).to(tl.int32)
    o_l, o_h = tl.arange(0, L), i_h * HEADS + tl.arange(0, HEADS)
    o_t, m_h = i_c * L + o_l, o_h < H
    b_start = tl.load(start + i_rc * L + o_l)
    o = (i_rc * H + o_h)[None, :] * L + o_l[:, None]
    m = m_h[None, :] & (o_l >= 0)[:, None]
    b_dt, b_direct = tl.load(dt + o, mask=m, other=0), tl.load(direct + o, mask=m, other=0)
    b_inside, b_leaving = tl.load(inside + o, mask=m, other=0), tl.load(leaving + o, mask=m, other=0)
    b_across = tl.load(across + i_rc * H + o_h, mask=m_h, other=0)
    b_log = tl.cumsum(b_inside, axis=0, reverse=True) + tl.cumsum(b_leaving, axis=0) - b_leaving
    # Nothing passes the decay of the first position of a sequence.
    b_log = tl.where((b_start < o_t)[:, None], b_log + b_across[None, :], 0.0)
    b_A = tl.load(A + o_h, mask=m_h, other=0).to(tl.float32)
    b_grad = b_direct + b_A[None, :] * b_log
    p_grad = grad_dt + (i_row * length + o_t)[:, None] * STRIDE + o_h[None, :]
    tl.store(p_grad, b_grad.to(grad_dt.dtype.element_ty), mask=m & (o_t < length)[:, None])
    tl.store(grad_A + i_rc * H + o_h, tl.sum(b_dt * b_log, axis=0), mask=m_h)


def ssd_bwd(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu: Tensor | None,
    entering: Tensor | None,
    rows: int = 1,
    *,
    grad_x: Tensor,
    grad_dt: Tensor,
    grad_B: Tensor,
    grad_C: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of x, dt, B and C; return those of A and D, float32 (heads,).

    Shapes and strides as of `ssd_fwd`, the gradients' too: each of its own stride between
    positions. `entering` is what `ssd_fwd` returned beside y; None computes it again.
    """
    heads, P, N = x.shape[1], x.shape[2], B.shape[1]
    divided = divide(dt, A, cu, rows, CHUNK)
    span = span_of(divided)
    if entering is None or CHUNK != FORWARD_CHUNK:
        entering = segment_states(x, B, divided, span, back=False)
    states = chunk_states(x, B, divided, span, entering, back=False)
    entering = segment_states(grad, C, divided, span, back=True)
    grad_states = chunk_states(grad, C, divided, span, entering, back=True)

    blocks = rows * divided.chunks
    groups = max(1, min(PROGRAMS // max(1, blocks), heads))
    groups = triton.cdiv(heads, triton.cdiv(heads, groups))
    to_B, to_C = grad_B, grad_C
    if groups > 1:
        to_B, to_C = torch.empty(
            2, groups, *B.shape, dtype=torch.float32, device=x.device
        ).unbind()
    vectors = torch.empty(3, blocks, heads, CHUNK, dtype=torch.float32, device=x.device)
    scalars = vectors.new_empty(3, blocks, heads)
    direct, inside, leaving = vectors.unbind()
    across, part_D, part_A = scalars.unbind()
    launch(
        ssd_backward_kernel,
        (blocks, groups),
        {
            "grad": grad,
            "x": x,
            "B": B,
            "C": C,
            "D": D,
            **divided.tensors,
            "states": states,
            "grad_states": grad_states,
            "grad_x": grad_x,
            "grad_B": to_B,
            "grad_C": to_C,
            "direct": direct,
            "inside": inside,
            "leaving": leaving,
            "across": across,
            "grad_D": part_D,
            "length": divided.length,
            "chunks": divided.chunks,
            "total": x.shape[0],
            "per_group": triton.cdiv(heads, groups),
            "batch": divided.batch,
        },
        {
            "SG": grad.stride(0),
            "SX": x.stride(0),
            "SB": B.stride(0),
            "SC": C.stride(0),
            "SGX": grad_x.stride(0),
            "SGB": to_B.stride(-2),
            "SGC": to_C.stride(-2),
            "P": P,
            "N": N,
            "PRECISION": precision(x.dtype),
            "STAGES": STAGES,
            **divided.constants,
        },
        num_warps=WARPS,
    )
    if groups > 1:
        grad_B.copy_(to_B.sum(0))
        grad_C.copy_(to_C.sum(0))
    block = min(32, power_of_2(heads))
    launch(
        ssd_decay_kernel,
        (blocks, triton.cdiv(heads, block)),
        {
            "dt": divided.dt,
            "A": A,
            "start": divided.start,
            "direct": direct,
            "inside": inside,
            "leaving": leaving,
            "across": across,
            "grad_dt": grad_dt,
            "grad_A": part_A,
            "length": divided.length,
            "chunks": divided.chunks,
        },
        {"STRIDE": grad_dt.stride(0), "HEADS": block, "H": heads, "L": CHUNK},
        num_warps=4,
    )
    return part_A.sum(0), part_D.sum(0)
