"""The gradients of the state-space recurrence.

With u_j = dt_j x_j, a the logarithm of the decay from before the chunk, E_ij = exp(a_i - a_j) for
j <= i in one sequence, S what enters the chunk and G the gradient of what leaves it:

    du_j  = sum over i of (C_i . B_j) E_ij dy_i  +  exp(a_last - a_j) G^T B_j
    dC_i  = sum over heads of [ sum over j of E_ij (dy_i . u_j) B_j  +  exp(a_i) S dy_i ]
    dB_j  = sum over heads of [ sum over i of E_ij (dy_i . u_j) C_i  +  exp(a_last - a_j) G u_j ]

The gradient of the logarithm of one decay, that of position k, sums over the pairs j < k <= i that
it stands between: pairs within the chunk, pairs that come from before it, pairs that go behind it,
and those that do both, which are exp(a_last) <S, G>.

Kernels walk over the heads of half a chunk, with sums over heads in their registers: one has the
pairs within the chunk, and du; another, once for C and once for B, what crosses its edges. Pairs
are (j, i), so that their weights are the left side of a product as they are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import launch, power_of_2
from h_net_dynamic_chunking.ops._triton.ssd_chunks import (
    Chunks,
    divide,
    live_positions,
    precision,
)
from h_net_dynamic_chunking.ops._triton.ssd_states import chunk_states, segment_states

# How many programs should have a part of the heads: with more, sums over heads go through memory.
PROGRAMS = 256
# Loops of all three kernels have 1 stage, which leaves the most room for programs. ms for 65536
# positions, 32 heads of 64, d_state 128, bfloat16, on an H200, with 1 / 2 / 3 stages:
#     pairs 0.65 / 0.72 / 0.91,  halves 0.14 / 0.16 / 0.14,  keys 0.67 / 0.79 / 0.85
# 8 warps take 1.2 for the keys.
WARPS = 4


@triton.jit
def _products(b_B, b_C, o_j, o_i, b_start, PRECISION: tl.constexpr):
    """B_j . C_i of pairs, 0 where i does not see j."""
    m_pair = (o_j[:, None] <= o_i[None, :]) & (o_j[:, None] >= b_start[None, :])
    return tl.where(m_pair, tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION), 0.0)


@triton.jit
def _pairs(b_BC, b_x, b_g, b_dt, b_a, b_grad_x, b_grad_BC, PRECISION: tl.constexpr):
    """Adds to the gradients of x_j and of B_j . C_i; and the sums of the gradients of the pairs'
    decays over i, without dt_j, and over j, with it.

    The latter two cancel but for pairs that stand across a position: they are sums of equal terms.
    """
    # Where no pair is, the decay is held at 1 for infinity, and the product of 0 makes it nothing.
    b_E = tl.exp2(tl.minimum(b_a[None, :] - b_a[:, None], 0.0))
    b_gx = tl.dot(b_x, tl.trans(b_g), input_precision=PRECISION) * b_E
    b_E *= b_dt[:, None]
    b_grad_x = tl.dot((b_BC * b_E).to(b_g.dtype), b_g, b_grad_x, input_precision=PRECISION)
    b_begin = tl.sum(b_gx * b_BC, axis=1)
    b_gx *= b_dt[:, None]
    b_end = tl.sum(b_gx * b_BC, axis=0)
    return b_grad_x, b_grad_BC + b_gx, b_begin, b_end


@triton.jit(do_not_specialize=["length", "chunks", "blocks", "per_group", "batch"])
def ssd_pairs_kernel(
    grad,
    x,
    B,
    C,
    D,
    dt,
    decay,
    start,
    cu,
    grad_states,
    grad_x,
    grad_products,
    begin,
    end,
    cross,
    skip,
    length,
    chunks,
    blocks,
    per_group,
    batch,
    SG: tl.constexpr,
    SX: tl.constexpr,
    SB: tl.constexpr,
    SC: tl.constexpr,
    SGX: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Pairs that begin in one half of the chunk: the gradient of x; of the products, summed over
    each group of heads; of the decays of the pairs, as `_pairs` has them, in (rows * chunks, H, L),
    apart for those that end in the other half; and dy . x of each position."""
    i_rc, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_row, i_c = i_rc // chunks, (i_rc % chunks).to(tl.int32)
    live = live_positions(cu, batch, length, PACKED)
    HALF: tl.constexpr = L // 2
    dtype = x.dtype.element_ty
    o_l, o_p, o_n = tl.arange(0, HALF), tl.arange(0, P), tl.arange(0, N)
    if not EARLY:
        o_l += HALF
    o_t = i_c * L + o_l
    m_t = (o_t < live)[:, None]
    row = i_row * length + i_c * L
    grad, x, grad_x = grad + row * SG, x + row * SX, grad_x + row * SGX
    B, C = B + row * SB, C + row * SC
    p_start = start + i_rc * L + o_l
    b_leaves = o_t >= tl.load(start + i_rc * L + L - 1)
    b_B = tl.load(B + o_l[:, None] * SB + o_n[None, :], mask=m_t, other=0)
    b_C = tl.load(C + o_l[:, None] * SC + o_n[None, :], mask=m_t, other=0)
    b_BC = _products(b_B, b_C, o_t, o_t, tl.load(p_start), PRECISION)
    b_grad_BC = tl.zeros([HALF, HALF], tl.float32)
    if EARLY:
        m_late = (o_t + HALF < live)[:, None]
        b_C = tl.load(C + (o_l + HALF)[:, None] * SC + o_n[None, :], mask=m_late, other=0)
        b_start = tl.load(p_start + HALF)
        b_BC_late = _products(b_B, b_C, o_t, o_t + HALF, b_start, PRECISION).to(dtype)
    first = i_g * per_group
    for i_h in tl.range(first, tl.minimum(first + per_group, H), num_stages=1):
        p_vector = (i_rc * H + i_h) * L + o_l
        p_x, p_g = x + i_h * P + o_p[None, :], grad + i_h * P + o_p[None, :]
        b_x = tl.load(p_x + o_l[:, None] * SX, mask=m_t, other=0)
        b_g = tl.load(p_g + o_l[:, None] * SG, mask=m_t, other=0)
        p_G = grad_states + (i_rc * H + i_h) * (N * P) + o_n[:, None] * P + o_p[None, :]
        b_G = tl.load(p_G)
        b_dt, b_a = tl.load(dt + p_vector), tl.load(decay + p_vector)
        a_last = tl.load(decay + (i_rc * H + i_h) * L + L - 1)
        b_leave = tl.where(b_leaves, tl.exp2(a_last - b_a), 0.0)

        b_grad_x = tl.dot(b_B, b_G, input_precision=PRECISION) * (b_leave * b_dt)[:, None]
        b_wide = b_g.to(tl.float32)
        tl.store(skip + p_vector, tl.sum(b_x.to(tl.float32) * b_wide, axis=1))
        b_grad_x += tl.load(D + i_h).to(tl.float32) * b_wide
        if EARLY:
            # The decay from half to half is the product of those to and from the edge between.
            a_edge = tl.load(decay + (i_rc * H + i_h) * L + HALF - 1)
            b_after = tl.exp2(tl.load(decay + p_vector + HALF) - a_edge)
            b_late = tl.load(p_g + (o_l + HALF)[:, None] * SG, mask=m_late, other=0)
            b_late = (b_late.to(tl.float32) * b_after[:, None]).to(dtype)
            b_read = tl.dot(b_BC_late, b_late, input_precision=PRECISION)
            b_before = tl.exp2(a_edge - b_a)
            tl.store(cross + p_vector, tl.sum(b_read * b_x.to(tl.float32), axis=1) * b_before)
            b_grad_x += b_read * (b_before * b_dt)[:, None]
        b_grad_x, b_grad_BC, b_begin, b_end = _pairs(
            b_BC, b_x, b_g, b_dt, b_a, b_grad_x, b_grad_BC, PRECISION
        )
        tl.store(begin + p_vector, b_begin)
        tl.store(end + p_vector, b_end)
        p_grad_x = grad_x + i_h * P + o_l[:, None] * SGX + o_p[None, :]
        tl.store(p_grad_x, b_grad_x.to(grad_x.dtype.element_ty), mask=(o_t < length)[:, None])
    p_out = grad_products + (i_g.to(tl.int64) * blocks + i_rc) * (L * L)
    tl.store(p_out + o_l[:, None] * L + o_l[None, :], b_grad_BC)


@triton.jit(do_not_specialize=["length", "chunks", "blocks", "per_group", "batch"])
def ssd_halves_kernel(
    grad,
    x,
    B,
    C,
    dt,
    decay,
    start,
    cu,
    grad_products,
    cross,
    length,
    chunks,
    blocks,
    per_group,
    batch,
    SG: tl.constexpr,
    SX: tl.constexpr,
    SB: tl.constexpr,
    SC: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Pairs from the early half to the later one: the gradient of the products, and of the decays
    by where they end in (rows * chunks, H, L). Rounded otherwise than where they begin, which
    `ssd_pairs_kernel` has, so that the two do not cancel."""
    i_rc, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_row, i_c = i_rc // chunks, (i_rc % chunks).to(tl.int32)
    live = live_positions(cu, batch, length, PACKED)
    HALF: tl.constexpr = L // 2
    dtype = x.dtype.element_ty
    o_l, o_p, o_n = tl.arange(0, HALF), tl.arange(0, P), tl.arange(0, N)
    o_t = i_c * L + o_l
    m_t, m_late = (o_t < live)[:, None], (o_t + HALF < live)[:, None]
    row = i_row * length + i_c * L
    x, B = x + row * SX, B + row * SB
    grad, C = grad + (row + HALF) * SG, C + (row + HALF) * SC
    b_B = tl.load(B + o_l[:, None] * SB + o_n[None, :], mask=m_t, other=0)
    b_C = tl.load(C + o_l[:, None] * SC + o_n[None, :], mask=m_late, other=0)
    b_start = tl.load(start + i_rc * L + HALF + o_l)
    b_CB = tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION)
    b_CB = tl.where(o_t[None, :] >= b_start[:, None], b_CB, 0.0).to(dtype)
    b_grad_CB = tl.zeros([HALF, HALF], tl.float32)
    first = i_g * per_group
    for i_h in tl.range(first, tl.minimum(first + per_group, H), num_stages=1):
        p_vector = (i_rc * H + i_h) * L + o_l
        b_x = tl.load(x + i_h * P + o_l[:, None] * SX + o_p[None, :], mask=m_t, other=0)
        b_g = tl.load(grad + i_h * P + o_l[:, None] * SG + o_p[None, :], mask=m_late, other=0)
        a_edge = tl.load(decay + (i_rc * H + i_h) * L + HALF - 1)
        b_before = tl.exp2(a_edge - tl.load(decay + p_vector)) * tl.load(dt + p_vector)
        b_after = tl.exp2(tl.load(decay + p_vector + HALF) - a_edge)
        b_u = (b_x.to(tl.float32) * b_before[:, None]).to(dtype)
        b_wide = b_g.to(tl.float32) * b_after[:, None]
        b_read = tl.dot(b_CB, b_u, input_precision=PRECISION)
        tl.store(cross + p_vector + HALF, tl.sum(b_read * b_wide, axis=1))
        b_grad_CB = tl.dot(b_wide.to(dtype), tl.trans(b_u), b_grad_CB, input_precision=PRECISION)
    p_out = grad_products + (i_g.to(tl.int64) * blocks + i_rc) * (L * L)
    tl.store(p_out + o_l[None, :] * L + HALF + o_l[:, None], b_grad_CB)


@triton.jit(
    do_not_specialize=["length", "chunks", "blocks", "total", "groups", "per_group", "batch"]
)
def ssd_keys_kernel(
    values,
    keys,
    others,
    dt,
    decay,
    start,
    cu,
    states,
    entering,
    grad_products,
    grad_keys,
    edge,
    across,
    length,
    chunks,
    blocks,
    total,
    groups,
    per_group,
    batch,
    SV: tl.constexpr,
    SK: tl.constexpr,
    SO: tl.constexpr,
    SGK: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BACK: tl.constexpr,
    PRECISION: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The gradient of C in half a chunk, and of the decays of pairs that enter the chunk, by where
    they end. BACK: the gradient of B, and of the decays of pairs that leave the chunk, by where
    they begin and without dt; and <S, G> by rows, of which each half has half.

    values, keys, others, states:   dy, C, B, S or, BACK, x, B, C, G
    """
    i_half, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_rc, i_late = i_half // 2, (i_half % 2).to(tl.int32)
    i_row, i_c = i_rc // chunks, (i_rc % chunks).to(tl.int32)
    live = live_positions(cu, batch, length, PACKED)
    HALF: tl.constexpr = L // 2
    dtype = values.dtype.element_ty
    o_l, o_p, o_n = i_late * HALF + tl.arange(0, HALF), tl.arange(0, P), tl.arange(0, N)
    o_t = i_c * L + o_l
    m_t = (o_t < live)[:, None]
    row = i_row * length + i_c * L
    values, keys, others = values + row * SV, keys + row * SK, others + row * SO
    if BACK:
        m_edge = o_t >= tl.load(start + i_rc * L + L - 1)
    else:
        m_edge = tl.load(start + i_rc * L + o_l) < i_c * L
    b_grad = tl.zeros([HALF, N], tl.float32)
    # The pairs within the chunk, from all groups of heads, go to the first group.
    if i_g == 0:
        if BACK:
            begin, end = i_late, 2
        else:
            begin, end = 0, i_late + 1
        for i_other in range(begin, end):
            o_other = i_other * HALF + tl.arange(0, HALF)
            o_t_other = i_c * L + o_other
            if BACK:
                o_pair = o_l[:, None] * L + o_other[None, :]
                b_start = tl.load(start + i_rc * L + o_other)[None, :]
                m_pair = (o_t[:, None] <= o_t_other[None, :]) & (o_t[:, None] >= b_start)
            else:
                o_pair = o_l[:, None] + o_other[None, :] * L
                b_start = tl.load(start + i_rc * L + o_l)[:, None]
                m_pair = (o_t_other[None, :] <= o_t[:, None]) & (o_t_other[None, :] >= b_start)
            b_pair = tl.zeros([HALF, HALF], tl.float32)
            for i in range(0, groups):
                p_pair = grad_products + (i_rc + i * blocks) * (L * L) + o_pair
                b_pair += tl.load(p_pair, mask=m_pair, other=0)
            p_other = others + o_other[:, None] * SO + o_n[None, :]
            b_other = tl.load(p_other, mask=(o_t_other < live)[:, None], other=0)
            b_grad = tl.dot(b_pair.to(dtype), b_other, b_grad, input_precision=PRECISION)
    b_k = tl.load(keys + o_l[:, None] * SK + o_n[None, :], mask=m_t, other=0)
    o_part = i_late * (N // 2) + tl.arange(0, N // 2)
    first = i_g * per_group
    for i_h in tl.range(first, tl.minimum(first + per_group, H), num_stages=1):
        i_rch = i_rc * H + i_h
        p_v = values + i_h * P + o_l[:, None] * SV + o_p[None, :]
        b_v = tl.load(p_v, mask=m_t, other=0)
        p_S = states + i_rch * (N * P)
        b_S = tl.load(p_S + o_n[:, None] * P + o_p[None, :])
        b_a = tl.load(decay + i_rch * L + o_l)
        if BACK:
            b_w = tl.where(m_edge, tl.exp2(tl.load(decay + i_rch * L + L - 1) - b_a), 0.0)
        else:
            b_w = tl.where(m_edge, tl.exp2(b_a), 0.0)
        b_read = tl.dot(b_k, b_S, input_precision=PRECISION)
        b_edge = tl.sum(b_read * b_v.to(tl.float32), axis=1) * b_w
        tl.store(edge + i_rch * L + o_l, b_edge)
        if BACK:
            b_w *= tl.load(dt + i_rch * L + o_l)
            o_both = o_part[:, None] * P + o_p[None, :]
            b_G = tl.load(p_S + o_both).to(tl.float32)
            b_both = tl.load(entering + i_rch * (N * P) + o_both).to(tl.float32)
            b_both = tl.sum(b_both * b_G, axis=1)
            tl.store(across + i_rch * N + o_part, b_both)
        b_v = (b_v.to(tl.float32) * b_w[:, None]).to(dtype)
        b_grad = tl.dot(b_v, tl.trans(b_S), b_grad, input_precision=PRECISION)

    # Each group of heads has a buffer of its own.
    row += i_g.to(tl.int64) * total
    p_grad = grad_keys + row * SGK + o_l[:, None] * SGK + o_n[None, :]
    tl.store(p_grad, b_grad.to(grad_keys.dtype.element_ty), mask=(o_t < length)[:, None])


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_decay_kernel(
    dt,
    decay,
    A,
    start,
    begin,
    end,
    cross,
    skip,
    entering,
    leaving,
    across,
    grad_dt,
    grad_A,
    grad_D,
    length,
    chunks,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
):
    """Gradients of dt, and of A and D from each chunk, (rows * chunks, H)."""
    i_rc, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_row, i_c = i_rc // chunks, (i_rc % chunks).to(tl.int32)
    o_l, o_n, o_h = tl.arange(0, L), tl.arange(0, N), i_h * HEADS + tl.arange(0, HEADS)
    o_t, m_h = i_c * L + o_l, o_h < H
    b_start = tl.load(start + i_rc * L + o_l)
    o = (i_rc * H + o_h)[None, :] * L + o_l[:, None]
    m = m_h[None, :] & (o_l >= 0)[:, None]
    b_dt, b_begin = tl.load(dt + o, mask=m, other=0), tl.load(begin + o, mask=m, other=0)
    b_end = tl.load(end + o, mask=m, other=0) + tl.load(entering + o, mask=m, other=0)
    # From half to half: by where they begin in the early one, and by where they end in the other.
    m_late = (o_l >= L // 2)[:, None]
    b_cross = tl.load(cross + o, mask=m, other=0)
    b_from, b_to = tl.where(m_late, 0.0, b_cross), tl.where(m_late, b_cross, 0.0)
    b_leaving = tl.load(leaving + o, mask=m, other=0)
    o_state = (i_rc * H + o_h)[None, :] * N + o_n[:, None]
    b_across = tl.load(across + o_state, mask=m_h[None, :] & (o_n >= 0)[:, None], other=0)
    m_across = m_h & (tl.load(start + i_rc * L + L - 1) < i_c * L)
    a_last = tl.load(decay + (i_rc * H + o_h) * L + L - 1, mask=m_h, other=0)
    b_both = tl.where(m_across, tl.exp2(a_last) * tl.sum(b_across, axis=0), 0.0)
    # What ends at or behind a position but does not begin there, and what leaves from before it,
    b_out = b_dt * (b_leaving + b_from)
    b_log = tl.cumsum(b_end + b_to - b_dt * b_begin, axis=0, reverse=True)
    b_log += tl.cumsum(b_out, axis=0) - b_out + b_both[None, :]
    # where pairs from half to half count in each half by their end there, else they would twice.
    b_twice = tl.where(
        m_late, tl.sum(b_dt * b_from, axis=0)[None, :], tl.sum(b_to, axis=0)[None, :]
    )
    b_log -= b_twice
    # Nothing passes the decay of the first position of a sequence.
    b_log = tl.where((b_start < o_t)[:, None], b_log, 0.0)
    b_A = tl.load(A + o_h, mask=m_h, other=0).to(tl.float32)
    b_grad = b_begin + b_from + b_leaving + b_A[None, :] * b_log
    p_grad = grad_dt + (i_row * length + o_t)[:, None] * STRIDE + o_h[None, :]
    tl.store(p_grad, b_grad.to(grad_dt.dtype.element_ty), mask=m & (o_t < length)[:, None])
    tl.store(grad_A + i_rc * H + o_h, tl.sum(b_dt * b_log, axis=0), mask=m_h)
    b_skip = tl.sum(tl.load(skip + o, mask=m, other=0), axis=0)
    tl.store(grad_D + i_rc * H + o_h, b_skip, mask=m_h)


def ssd_bwd(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    cu: Tensor | None,
    states: Tensor | None,
    rows: int = 1,
    *,
    grad_x: Tensor,
    grad_dt: Tensor,
    grad_B: Tensor,
    grad_C: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of x, dt, B and C; return those of A and D, float32 (heads,).

    Shapes and strides as of `ssd_fwd`, the gradients' too: each of its own stride between
    positions. `states` is what `ssd_fwd` returned beside y; None computes it again.
    """
    divided = divide(dt, A, cu, rows, x.dtype)
    if states is None:
        entering = segment_states(x, B, divided, back=False)
        states = chunk_states(x, B, divided, entering, back=False)
    behind = segment_states(grad, C, divided, back=True)
    grad_states = chunk_states(grad, C, divided, behind, back=True)
    del behind

    blocks, heads, L = divided.dt.shape
    per_group = triton.cdiv(heads, max(1, min(PROGRAMS // max(blocks, 1), heads)))
    groups = triton.cdiv(heads, per_group)
    vectors = torch.empty(6, blocks, heads, L, dtype=torch.float32, device=x.device)
    begin, end, cross, skip, entered, left = vectors
    across = vectors.new_empty(blocks, heads, B.shape[1])
    grad_products = vectors.new_empty(groups, blocks, L, L)
    shares = {"per_group": per_group, "blocks": blocks, "groups": groups}
    pairs = {"begin": begin, "end": end, "cross": cross, "skip": skip}
    inputs = {"grad": grad, "x": x, "B": B, "C": C}
    for early in (True, False):
        _pairs_of_half(inputs, D, divided, grad_states, grad_x, grad_products, pairs, shares, early)
    _halves(inputs, divided, grad_products, cross, shares)
    for back in (False, True):
        _keys(
            *(
                (x, B, C, grad_states, grad_B, left)
                if back
                else (grad, C, B, states, grad_C, entered)
            ),
            divided,
            states,
            grad_products,
            across,
            shares,
            back,
        )
    parts = vectors.new_empty(2, blocks, heads)
    crossing = {"entering": entered, "leaving": left, "across": across}
    _decays(divided, A, {**pairs, **crossing}, grad_dt, parts, B.shape[1])
    grad_A, grad_D = parts.sum(1)
    return grad_A, grad_D


def _pairs_of_half(
    inputs: dict[str, Tensor],
    D: Tensor,
    divided: Chunks,
    grad_states: Tensor,
    grad_x: Tensor,
    grad_products: Tensor,
    vectors: dict[str, Any],
    shares: dict[str, int],
    early: bool,
) -> None:
    x, B = inputs["x"], inputs["B"]
    launch(
        ssd_pairs_kernel,
        (shares["blocks"], shares["groups"]),
        {
            **inputs,
            "D": D,
            **divided.tensors,
            "grad_states": grad_states,
            "grad_x": grad_x,
            "grad_products": grad_products,
            **vectors,
            "length": divided.length,
            "chunks": divided.chunks,
            "blocks": shares["blocks"],
            "per_group": shares["per_group"],
            "batch": divided.batch,
        },
        {
            **_strides(inputs),
            "SGX": grad_x.stride(0),
            "P": x.shape[2],
            "N": B.shape[1],
            "EARLY": early,
            "PRECISION": precision(x.dtype),
            **divided.constants,
        },
        num_warps=WARPS,
    )


def _strides(inputs: dict[str, Tensor]) -> dict[str, int]:
    names = {"grad": "SG", "x": "SX", "B": "SB", "C": "SC"}
    return {names[name]: tensor.stride(0) for name, tensor in inputs.items()}


def _halves(
    inputs: dict[str, Tensor],
    divided: Chunks,
    grad_products: Tensor,
    cross: Tensor,
    shares: dict[str, int],
) -> None:
    x, B = inputs["x"], inputs["B"]
    launch(
        ssd_halves_kernel,
        (shares["blocks"], shares["groups"]),
        {
            **inputs,
            **divided.tensors,
            "grad_products": grad_products,
            "cross": cross,
            "length": divided.length,
            "chunks": divided.chunks,
            "blocks": shares["blocks"],
            "per_group": shares["per_group"],
            "batch": divided.batch,
        },
        {
            **_strides(inputs),
            "P": x.shape[2],
            "N": B.shape[1],
            "PRECISION": precision(x.dtype),
            **divided.constants,
        },
        num_warps=WARPS,
    )


def _keys(
    values: Tensor,
    keys: Tensor,
    others: Tensor,
    states: Tensor,
    grad_keys: Tensor,
    edge: Tensor,
    divided: Chunks,
    entering: Tensor,
    grad_products: Tensor,
    across: Tensor,
    shares: dict[str, int],
    back: bool,
) -> None:
    to = grad_keys
    if shares["groups"] > 1:
        to = across.new_empty(shares["groups"], *keys.shape)
    launch(
        ssd_keys_kernel,
        (2 * shares["blocks"], shares["groups"]),
        {
            "values": values,
            "keys": keys,
            "others": others,
            **divided.tensors,
            "states": states,
            "entering": entering,
            "grad_products": grad_products,
            "grad_keys": to,
            "edge": edge,
            "across": across,
            "length": divided.length,
            "chunks": divided.chunks,
            "blocks": shares["blocks"],
            "total": keys.shape[0],
            "groups": shares["groups"],
            "per_group": shares["per_group"],
            "batch": divided.batch,
        },
        {
            "SV": values.stride(0),
            "SK": keys.stride(0),
            "SO": others.stride(0),
            "SGK": to.stride(-2),
            "P": values.shape[2],
            "N": keys.shape[1],
            "BACK": back,
            "PRECISION": precision(values.dtype),
            **divided.constants,
        },
        num_warps=WARPS,
    )
    if to is not grad_keys:
        grad_keys.copy_(to.sum(0))


def _decays(
    divided: Chunks,
    A: Tensor,
    vectors: dict[str, Any],
    grad_dt: Tensor,
    parts: Tensor,
    d_state: int,
) -> None:
    heads = divided.heads
    block = min(16, power_of_2(heads))
    launch(
        ssd_decay_kernel,
        (divided.start.shape[0], triton.cdiv(heads, block)),
        {
            "dt": divided.dt,
            "decay": divided.decay,
            "A": A,
            "start": divided.start,
            **vectors,
            "grad_dt": grad_dt,
            "grad_A": parts[0],
            "grad_D": parts[1],
            "length": divided.length,
            "chunks": divided.chunks,
        },
        {
            "STRIDE": grad_dt.stride(0),
            "HEADS": block,
            "N": d_state,
            "H": heads,
            "L": divided.size,
        },
        num_warps=4,
    )
