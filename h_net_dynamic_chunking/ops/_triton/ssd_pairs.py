"""The gradients of the recurrence from the pairs of positions within a chunk, and those of x.

The equations are at the top of `ssd_backward`. Kernels walk over the heads of half a chunk, with
sums over heads in their registers. Pairs are (j, i), so that their weights are the left side of a
product as they are.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import launch
from h_net_dynamic_chunking.ops._triton.ssd_chunks import Chunks, live_positions, precision

# Loops of these kernels, and of those for the keys, have 1 stage, which leaves the most room for
# programs. ms for 65536 positions, 32 heads of 64, d_state 128, bfloat16, H200, 1 / 2 / 3 stages:
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
    So a position's pair with itself, whose decay is always 1, has no place here.
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
    own,
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
    apart for those that end in the other half; dy . x of each position, skip, and B . C, own."""
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
    # A position's pair with itself, of which `_pairs` knows nothing, adds to what D does.
    m_own = o_l[:, None] == o_l[None, :]
    b_own = tl.sum(tl.where(m_own, b_BC, 0.0), axis=1)
    b_BC = tl.where(m_own, 0.0, b_BC)
    if i_g == 0:
        tl.store(own + i_rc * L + o_l, b_own)
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
        b_grad_x += (tl.load(D + i_h).to(tl.float32) + b_own * b_dt)[:, None] * b_wide
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


def pairs_of_half(
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


def halves(
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


def _strides(inputs: dict[str, Tensor]) -> dict[str, int]:
    names = {"grad": "SG", "x": "SX", "B": "SB", "C": "SC"}
    return {names[name]: tensor.stride(0) for name, tensor in inputs.items()}
