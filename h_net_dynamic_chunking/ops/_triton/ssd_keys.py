"""The gradients of B and C of the recurrence from what crosses the edges of a chunk.

The equations are at the top of `ssd_backward`. One kernel, once for C with what enters the chunk,
once for B with the gradient of what leaves it, walks over the heads with its sums in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import launch
from h_net_dynamic_chunking.ops._triton.ssd_chunks import Chunks, live_positions, precision
from h_net_dynamic_chunking.ops._triton.ssd_pairs import WARPS


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


def keys_of_chunks(
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
