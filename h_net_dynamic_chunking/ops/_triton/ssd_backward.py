"""The gradients of the state-space recurrence.

With u_j = dt_j x_j, a the logarithm of the decay from before the chunk, E_ij = exp(a_i - a_j) for
j <= i in one sequence, S what enters the chunk and G the gradient of what leaves it:

    du_j  = sum over i of (C_i . B_j) E_ij dy_i  +  exp(a_last - a_j) G^T B_j
    dC_i  = sum over heads of [ sum over j of E_ij (dy_i . u_j) B_j  +  exp(a_i) S dy_i ]
    dB_j  = sum over heads of [ sum over i of E_ij (dy_i . u_j) C_i  +  exp(a_last - a_j) G u_j ]

The gradient of the logarithm of one decay, that of position k, sums over the pairs j < k <= i that
it stands between: pairs within the chunk, pairs that come from before it, pairs that go behind it,
and those that do both, which are exp(a_last) <S, G>.

Two kernels walk over the heads of a chunk with sums over heads in their registers, which would not
fit into those of one: the first has what concerns pairs within a chunk, and du, the second the
rest. Pairs are (j, i), so that their weights are the left side of a product as they are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton import ssd_forward
from h_net_dynamic_chunking.ops._triton.common import launch, power_of_2
from h_net_dynamic_chunking.ops._triton.ssd_chunks import (
    Chunks,
    divide,
    fitting,
    live_positions,
    precision,
)
from h_net_dynamic_chunking.ops._triton.ssd_states import chunk_states, segment_states

# To be measured. Positions of a chunk, and how many programs should have a part of the heads.
CHUNK, PROGRAMS = 128, 256
PAIRS_WARPS, PAIRS_STAGES = 8, 2
KEYS_WARPS, KEYS_STAGES = 8, 2


@triton.jit(do_not_specialize=["length", "chunks", "batch"])
def ssd_products_kernel(
    B,
    C,
    start,
    cu,
    products,
    length,
    chunks,
    batch,
    SB: tl.constexpr,
    SC: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    PACKED: tl.constexpr,
):
    """B_j . C_i of the pairs of each chunk, j <= i in one sequence; 0 elsewhere."""
    i_rc = tl.program_id(0).to(tl.int64)
    i_row, i_c = i_rc // chunks, (i_rc % chunks).to(tl.int32)
    live = live_positions(cu, batch, length, PACKED)
    o_l, o_n = tl.arange(0, L), tl.arange(0, N)
    o_t = i_c * L + o_l
    m_t = (o_t < live)[:, None]
    o_row = (i_row * length + o_t)[:, None]
    b_B = tl.load(B + o_row * SB + o_n[None, :], mask=m_t, other=0)
    b_C = tl.load(C + o_row * SC + o_n[None, :], mask=m_t, other=0)
    b_start = tl.load(start + i_rc * L + o_l)
    m_pair = (o_t[:, None] <= o_t[None, :]) & (o_t[:, None] >= b_start[None, :])
    b_BC = tl.where(m_pair, tl.dot(b_B, tl.trans(b_C), input_precision=PRECISION), 0.0)
    p_out = products + i_rc * (L * L) + o_l[:, None] * L + o_l[None, :]
    tl.store(p_out, b_BC.to(products.dtype.element_ty))


@triton.jit
def _pairs(b_BC, b_x, b_g, b_dt, b_a, b_a_end, b_du, b_grad_BC, PRECISION: tl.constexpr):
    """Pairs (j, i) of all j and some i: adds to du and to the gradient of B_j . C_i; sums of the
    gradients of the pairs' decays over i, without dt_j, and over j, with it."""
    # Where no pair is, the decay is held at 1 for infinity, and the product of 0 makes it nothing.
    b_E = tl.exp2(tl.minimum(b_a_end[None, :] - b_a[:, None], 0.0))
    b_gx = tl.dot(b_x, tl.trans(b_g), input_precision=PRECISION) * b_E
    b_BC = b_BC.to(tl.float32)
    b_du = tl.dot((b_BC * b_E).to(b_g.dtype), b_g, b_du, input_precision=PRECISION)
    b_begin = tl.sum(b_gx * b_BC, axis=1)
    b_gu = b_gx * b_dt[:, None]
    b_end = tl.sum(b_gu * b_BC, axis=0)
    return b_du, b_grad_BC + b_gu, b_begin, b_end


@triton.jit(do_not_specialize=["length", "chunks", "blocks", "per_group", "batch"])
def ssd_pairs_kernel(
    grad,
    x,
    B,
    D,
    dt,
    decay,
    start,
    cu,
    products,
    grad_states,
    grad_x,
    grad_products,
    begin,
    end,
    length,
    chunks,
    blocks,
    per_group,
    batch,
    SG: tl.constexpr,
    SX: tl.constexpr,
    SB: tl.constexpr,
    SGX: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The gradient of x; of the products, summed over each group of heads; and of the decays of the
    pairs within the chunk, as `_pairs` has them, in (rows * chunks, H, L)."""
    i_rc, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_row, i_c = i_rc // chunks, (i_rc % chunks).to(tl.int32)
    live = live_positions(cu, batch, length, PACKED)
    HALF: tl.constexpr = L // 2
    o_l, o_half, o_p, o_n = (
        tl.arange(0, L),
        tl.arange(0, HALF),
        tl.arange(0, P),
        tl.arange(0, N),
    )
    o_t, o_early = i_c * L + o_l, i_c * L + o_half
    o_late = o_early + HALF
    m_t, m_early, m_late = (
        (o_t < live)[:, None],
        (o_early < live)[:, None],
        (o_late < live)[:, None],
    )
    o_row = (i_row * length + o_t)[:, None]
    o_row_early = (i_row * length + o_early)[:, None]
    b_leaves = o_t >= tl.load(start + i_rc * L + L - 1)
    b_B = tl.load(B + o_row * SB + o_n[None, :], mask=m_t, other=0)
    p_products = products + i_rc * (L * L) + o_l[:, None] * L + o_half[None, :]
    b_grad_early = tl.zeros([L, HALF], tl.float32)
    b_grad_late = tl.zeros([L, HALF], tl.float32)
    first = i_g * per_group
    for i_h in tl.range(first, tl.minimum(first + per_group, H), num_stages=STAGES):
        o_vector = (i_rc * H + i_h) * L
        o_x = i_h * P + o_p[None, :]
        b_x = tl.load(x + o_row * SX + o_x, mask=m_t, other=0)
        p_early = grad + o_row_early * SG + o_x
        b_g_early = tl.load(p_early, mask=m_early, other=0)
        b_g_late = tl.load(p_early + HALF * SG, mask=m_late, other=0)
        p_G = grad_states + (i_rc * H + i_h) * (N * P) + o_n[:, None] * P + o_p[None, :]
        b_G = tl.load(p_G)
        b_dt, b_a = tl.load(dt + o_vector + o_l), tl.load(decay + o_vector + o_l)
        b_a_early = tl.load(decay + o_vector + o_half)
        b_a_late = tl.load(decay + o_vector + HALF + o_half)
        b_leave = tl.where(b_leaves, tl.exp2(tl.load(decay + o_vector + L - 1) - b_a), 0.0)

        b_du = tl.dot(b_B, b_G, input_precision=PRECISION) * b_leave[:, None]
        b_BC = tl.load(p_products)
        b_du, b_grad_early, b_begin, b_end = _pairs(
            b_BC, b_x, b_g_early, b_dt, b_a, b_a_early, b_du, b_grad_early, PRECISION
        )
        tl.store(end + o_vector + o_half, b_end)
        b_BC = tl.load(p_products + HALF)
        b_du, b_grad_late, b_begin_late, b_end = _pairs(
            b_BC, b_x, b_g_late, b_dt, b_a, b_a_late, b_du, b_grad_late, PRECISION
        )
        tl.store(end + o_vector + HALF + o_half, b_end)
        tl.store(begin + o_vector + o_l, b_begin + b_begin_late)
        b_g = tl.load(grad + o_row * SG + o_x, mask=m_t, other=0).to(tl.float32)
        b_grad_x = b_du * b_dt[:, None] + tl.load(D + i_h).to(tl.float32) * b_g
        p_grad_x = grad_x + o_row * SGX + o_x
        tl.store(p_grad_x, b_grad_x.to(grad_x.dtype.element_ty), mask=(o_t < length)[:, None])
    p_out = grad_products + (i_g.to(tl.int64) * blocks + i_rc) * (L * L)
    p_out += o_l[:, None] * L + o_half[None, :]
    tl.store(p_out, b_grad_early)
    tl.store(p_out + HALF, b_grad_late)


@triton.jit(
    do_not_specialize=["length", "chunks", "blocks", "total", "groups", "per_group", "batch"]
)
def ssd_keys_kernel(
    grad,
    x,
    B,
    C,
    dt,
    decay,
    start,
    cu,
    states,
    grad_states,
    grad_products,
    grad_B,
    grad_C,
    entering,
    leaving,
    across,
    grad_D,
    length,
    chunks,
    blocks,
    total,
    groups,
    per_group,
    batch,
    SG: tl.constexpr,
    SX: tl.constexpr,
    SB: tl.constexpr,
    SC: tl.constexpr,
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
    """The gradients of B and C of half a chunk, and of the decays of pairs that enter the chunk, by
    where they end; that leave it, by where they begin and without dt; and that do both. Of D, from
    each half chunk, too."""
    i_half, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_rc, i_late = i_half // 2, (i_half % 2).to(tl.int32)
    i_row, i_c = i_rc // chunks, (i_rc % chunks).to(tl.int32)
    live = live_positions(cu, batch, length, PACKED)
    HALF: tl.constexpr = L // 2
    dtype = x.dtype.element_ty
    o_l, o_p, o_n = tl.arange(0, HALF), tl.arange(0, P), tl.arange(0, N)
    o_half = i_late * HALF + o_l
    o_t = i_c * L + o_half
    m_t = (o_t < live)[:, None]
    o_row = (i_row * length + o_t)[:, None]
    start_last = tl.load(start + i_rc * L + L - 1)
    m_enter = tl.load(start + i_rc * L + o_half) < i_c * L
    m_leave, m_across = o_t >= start_last, start_last < i_c * L
    b_B = tl.load(B + o_row * SB + o_n[None, :], mask=m_t, other=0)
    b_C = tl.load(C + o_row * SC + o_n[None, :], mask=m_t, other=0)
    b_grad_B = tl.zeros([HALF, N], tl.float32)
    b_grad_C = tl.zeros([HALF, N], tl.float32)
    o_state = o_n[:, None] * P + o_p[None, :]
    first = i_g * per_group
    for i_h in tl.range(first, tl.minimum(first + per_group, H), num_stages=STAGES):
        i_rch = i_rc * H + i_h
        o_x = i_h * P + o_p[None, :]
        b_g = tl.load(grad + o_row * SG + o_x, mask=m_t, other=0)
        b_x = tl.load(x + o_row * SX + o_x, mask=m_t, other=0)
        b_S = tl.load(states + i_rch * (N * P) + o_state)
        b_G = tl.load(grad_states + i_rch * (N * P) + o_state)
        b_dt, b_a = tl.load(dt + i_rch * L + o_half), tl.load(decay + i_rch * L + o_half)
        a_last = tl.load(decay + i_rch * L + L - 1)
        b_enter = tl.where(m_enter, tl.exp2(b_a), 0.0)
        b_leave = tl.where(m_leave, tl.exp2(a_last - b_a), 0.0)

        b_part = tl.dot(b_g, tl.trans(b_S), input_precision=PRECISION)
        b_grad_C += b_part * b_enter[:, None]
        b_dot = tl.sum(b_part * b_C.to(tl.float32), axis=1)
        tl.store(entering + i_rch * L + o_half, b_enter * b_dot)
        b_part = tl.dot(b_x, tl.trans(b_G), input_precision=PRECISION)
        b_grad_B += b_part * (b_leave * b_dt)[:, None]
        b_dot = tl.sum(b_part * b_B.to(tl.float32), axis=1)
        tl.store(leaving + i_rch * L + o_half, b_leave * b_dot)

        b_both = tl.sum(tl.sum(b_S.to(tl.float32) * b_G.to(tl.float32), axis=1), axis=0)
        b_both = tl.where(m_across, tl.exp2(a_last) * b_both, 0.0)
        tl.store(across + i_rch, b_both, mask=i_late == 0)
        b_skip = tl.sum(tl.sum(b_x.to(tl.float32) * b_g.to(tl.float32), axis=1), axis=0)
        tl.store(grad_D + i_half * H + i_h, b_skip)

    # The pairs of this half, from all groups of heads, go to the first group.
    if i_g == 0:
        o_all = tl.arange(0, L)
        m_all = (i_c * L + o_all < live)[:, None]
        o_row_all = (i_row * length + i_c * L + o_all)[:, None]
        o_by_i, o_by_j = o_half[:, None] + o_all[None, :] * L, o_half[:, None] * L + o_all[None, :]
        b_by_i = tl.zeros([HALF, L], tl.float32)
        b_by_j = tl.zeros([HALF, L], tl.float32)
        for i in range(0, groups):
            p_products = grad_products + (i_rc + i * blocks) * (L * L)
            b_by_i += tl.load(p_products + o_by_i)
            b_by_j += tl.load(p_products + o_by_j)
        o_t_all = i_c * L + o_all
        b_start = tl.load(start + i_rc * L + o_half)
        m_pair = (o_t_all[None, :] <= o_t[:, None]) & (o_t_all[None, :] >= b_start[:, None])
        b_by_i = tl.where(m_pair, b_by_i, 0.0).to(dtype)
        b_start_all = tl.load(start + i_rc * L + o_all)
        m_pair = (o_t[:, None] <= o_t_all[None, :]) & (o_t[:, None] >= b_start_all[None, :])
        b_by_j = tl.where(m_pair, b_by_j, 0.0).to(dtype)
        b_all = tl.load(B + o_row_all * SB + o_n[None, :], mask=m_all, other=0)
        b_grad_C = tl.dot(b_by_i, b_all, b_grad_C, input_precision=PRECISION)
        b_all = tl.load(C + o_row_all * SC + o_n[None, :], mask=m_all, other=0)
        b_grad_B = tl.dot(b_by_j, b_all, b_grad_B, input_precision=PRECISION)
    # Each group of heads has a buffer of its own.
    o_row += i_g.to(tl.int64) * total
    m_row = (o_t < length)[:, None]
    p_grad_B, p_grad_C = grad_B + o_row * SGB + o_n[None, :], grad_C + o_row * SGC + o_n[None, :]
    tl.store(p_grad_B, b_grad_B.to(grad_B.dtype.element_ty), mask=m_row)
    tl.store(p_grad_C, b_grad_C.to(grad_C.dtype.element_ty), mask=m_row)


@triton.jit(do_not_specialize=["length", "chunks"])
def ssd_decay_kernel(
    dt,
    A,
    start,
    begin,
    end,
    entering,
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
    b_dt, b_begin = tl.load(dt + o, mask=m, other=0), tl.load(begin + o, mask=m, other=0)
    b_end = tl.load(end + o, mask=m, other=0) + tl.load(entering + o, mask=m, other=0)
    b_leaving = tl.load(leaving + o, mask=m, other=0)
    b_across = tl.load(across + i_rc * H + o_h, mask=m_h, other=0)
    # What ends at or behind a position but does not begin there, and what leaves from before it.
    b_left = b_dt * b_leaving
    b_log = tl.cumsum(b_end - b_dt * b_begin, axis=0, reverse=True)
    b_log += tl.cumsum(b_left, axis=0) - b_left + b_across[None, :]
    # Nothing passes the decay of the first position of a sequence.
    b_log = tl.where((b_start < o_t)[:, None], b_log, 0.0)
    b_A = tl.load(A + o_h, mask=m_h, other=0).to(tl.float32)
    b_grad = b_begin + b_leaving + b_A[None, :] * b_log
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
    size, pairs_stages = fitting(x.dtype, CHUNK, PAIRS_STAGES)
    _, keys_stages = fitting(x.dtype, CHUNK, KEYS_STAGES)
    divided = divide(dt, A, cu, rows, size)
    span = ssd_forward.span_of(divided)
    if entering is None:
        entering = segment_states(x, B, divided, span, back=False)
    states = chunk_states(x, B, divided, span, entering, back=False)
    del entering
    behind = segment_states(grad, C, divided, span, back=True)
    grad_states = chunk_states(grad, C, divided, span, behind, back=True)
    del behind

    heads, blocks = divided.heads, rows * divided.chunks
    per_group = triton.cdiv(heads, max(1, min(PROGRAMS // blocks, heads)))
    groups = triton.cdiv(heads, per_group)
    begin, end, enter, leave = torch.empty(
        4, blocks, heads, size, dtype=torch.float32, device=x.device
    )
    across, part_A = begin.new_empty(2, blocks, heads)
    inputs = {"grad": grad, "x": x, "B": B}
    where = {"length": divided.length, "chunks": divided.chunks, "blocks": blocks}
    heads_of = {"per_group": per_group, "batch": divided.batch}
    strides = {"SG": grad.stride(0), "SX": x.stride(0), "SB": B.stride(0)}
    sizes = {"P": x.shape[2], "N": B.shape[1], "PRECISION": precision(x.dtype)}
    grad_products = begin.new_empty(groups, blocks, size, size)
    launch(
        ssd_pairs_kernel,
        (blocks, groups),
        {
            **inputs,
            "D": D,
            **divided.tensors,
            "products": _products(B, C, divided),
            "grad_states": grad_states,
            "grad_x": grad_x,
            "grad_products": grad_products,
            "begin": begin,
            "end": end,
            **where,
            **heads_of,
        },
        {
            **strides,
            "SGX": grad_x.stride(0),
            **sizes,
            "STAGES": pairs_stages,
            **divided.constants,
        },
        num_warps=PAIRS_WARPS,
    )
    to_B, to_C = grad_B, grad_C
    if groups > 1:
        to_B, to_C = begin.new_empty(2, groups, *B.shape)
    part_D = begin.new_empty(2 * blocks, heads)
    launch(
        ssd_keys_kernel,
        (2 * blocks, groups),
        {
            **inputs,
            "C": C,
            **divided.tensors,
            "states": states,
            "grad_states": grad_states,
            "grad_products": grad_products,
            "grad_B": to_B,
            "grad_C": to_C,
            "entering": enter,
            "leaving": leave,
            "across": across,
            "grad_D": part_D,
            **where,
            "total": x.shape[0],
            "groups": groups,
            **heads_of,
        },
        {
            **strides,
            "SC": C.stride(0),
            "SGB": to_B.stride(-2),
            "SGC": to_C.stride(-2),
            **sizes,
            "STAGES": keys_stages,
            **divided.constants,
        },
        num_warps=KEYS_WARPS,
    )
    if groups > 1:
        grad_B.copy_(to_B.sum(0))
        grad_C.copy_(to_C.sum(0))
    vectors = {"begin": begin, "end": end, "entering": enter, "leaving": leave, "across": across}
    _decays(divided, A, vectors, grad_dt, part_A)
    return part_A.sum(0), part_D.sum(0)


def _products(B: Tensor, C: Tensor, divided: Chunks) -> Tensor:
    """(rows * chunks, L, L), in the dtype of B."""
    blocks, L = divided.start.shape
    products = B.new_empty(blocks, L, L)
    launch(
        ssd_products_kernel,
        blocks,
        {
            "B": B,
            "C": C,
            "start": divided.start,
            "cu": divided.tensors["cu"],
            "products": products,
            "length": divided.length,
            "chunks": divided.chunks,
            "batch": divided.batch,
        },
        {
            "SB": B.stride(0),
            "SC": C.stride(0),
            "N": B.shape[1],
            "PRECISION": precision(B.dtype),
            **divided.constants,
        },
        num_warps=8,
    )
    return products


def _decays(
    divided: Chunks, A: Tensor, vectors: dict[str, Any], grad_dt: Tensor, part_A: Tensor
) -> None:
    heads = divided.heads
    block = min(16, power_of_2(heads))
    launch(
        ssd_decay_kernel,
        (divided.start.shape[0], triton.cdiv(heads, block)),
        {
            "dt": divided.dt,
            "A": A,
            "start": divided.start,
            **vectors,
            "grad_dt": grad_dt,
            "grad_A": part_A,
            "length": divided.length,
            "chunks": divided.chunks,
        },
        {"STRIDE": grad_dt.stride(0), "HEADS": block, "H": heads, "L": divided.size},
        num_warps=4,
    )
