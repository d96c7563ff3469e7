"""The gradients of the state-space recurrence.

With u_j = dt_j x_j, a the logarithm of the decay from before the chunk, E_ij = exp(a_i - a_j) for
j <= i in one sequence, S what enters the chunk and G the gradient of what leaves it:

    du_j  = sum over i of (C_i . B_j) E_ij dy_i  +  exp(a_last - a_j) G^T B_j
    dC_i  = sum over heads of [ sum over j of E_ij (dy_i . u_j) B_j  +  exp(a_i) S dy_i ]
    dB_j  = sum over heads of [ sum over i of E_ij (dy_i . u_j) C_i  +  exp(a_last - a_j) G u_j ]

The gradient of the logarithm of one decay, that of position k, sums over the pairs j < k <= i that
it stands between: pairs within the chunk, pairs that come from before it, pairs that go behind it,
and those that do both, which are exp(a_last) <S, G>. No decay stands between a position and itself:
what such a pair has, (B_j . C_j) (x_j . dy_j), is added to the gradient of dt_j apart.

The pairs and du are those of `ssd_pairs`, what crosses the edges of a chunk that of `ssd_keys`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import launch, power_of_2
from h_net_dynamic_chunking.ops._triton.ssd_chunks import Chunks, divide
from h_net_dynamic_chunking.ops._triton.ssd_keys import keys_of_chunks
from h_net_dynamic_chunking.ops._triton.ssd_pairs import halves, pairs_of_half
from h_net_dynamic_chunking.ops._triton.ssd_states import chunk_states, segment_states

# How many programs should have a part of the heads: with more, sums over heads go through memory.
PROGRAMS = 256


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
    own,
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
    b_skip = tl.load(skip + o, mask=m, other=0)
    b_own = tl.load(own + i_rc * L + o_l)
    b_grad = b_own[:, None] * b_skip + b_begin + b_from + b_leaving + b_A[None, :] * b_log
    p_grad = grad_dt + (i_row * length + o_t)[:, None] * STRIDE + o_h[None, :]
    tl.store(p_grad, b_grad.to(grad_dt.dtype.element_ty), mask=m & (o_t < length)[:, None])
    tl.store(grad_A + i_rc * H + o_h, tl.sum(b_dt * b_log, axis=0), mask=m_h)
    tl.store(grad_D + i_rc * H + o_h, tl.sum(b_skip, axis=0), mask=m_h)


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
    own = vectors.new_empty(blocks, L)
    pairs = {"begin": begin, "end": end, "cross": cross, "skip": skip, "own": own}
    inputs = {"grad": grad, "x": x, "B": B, "C": C}
    for early in (True, False):
        pairs_of_half(inputs, D, divided, grad_states, grad_x, grad_products, pairs, shares, early)
    halves(inputs, divided, grad_products, cross, shares)
    for back in (False, True):
        keys_of_chunks(
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
