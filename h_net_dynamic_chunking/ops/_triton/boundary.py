"""Boundary probability: every query and every key is read once, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import (
    cdiv,
    halvings,
    launch,
    power_of_2,
    sequence_of,
)


@triton.jit
def _reciprocal_root(x):
    """1 / sqrt(x), and 0 for 0, for infinity, and (through infinity) for what overflowed."""
    b_root = tl.sqrt_rn(tl.where(x == 0, 1.0, x))
    return tl.where(x == 0, 0.0, tl.div_rn(1.0, b_root))


@triton.jit
def _cosine(b_qk, b_q_scale, b_k_scale):
    """A product that overflowed belongs to a norm that did too, and counts for nothing."""
    m_none = (b_q_scale == 0) | (b_k_scale == 0)
    return tl.where(m_none, 0.0, b_qk * b_q_scale * b_k_scale)


@triton.jit
def _has_predecessor(p_cu, o_t, B, steps):
    """Whether position t and the one before it are in the same sequence."""
    i_sequence = sequence_of(p_cu, o_t, B, steps)
    return (i_sequence < B) & (tl.load(p_cu + i_sequence).to(tl.int64) != o_t)


@triton.jit
def _load_pair(qk, o_t, o_d, m_tile, D):
    """Query t and key t - 1: a stretch of channels in float32."""
    p_q = qk + o_t[:, None] * (2 * D) + o_d[None, :]
    b_q = tl.load(p_q, mask=m_tile, other=0).to(tl.float32)
    b_k = tl.load(p_q - D, mask=m_tile, other=0).to(tl.float32)
    return b_q, b_k


@triton.jit(do_not_specialize=["T", "B", "steps"])
def boundary_fwd_kernel(
    qk, cu, p, T, B, steps, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    i_t = tl.program_id(0).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    m_pair = m_t & _has_predecessor(cu, o_t, B, steps)
    b_qq = tl.zeros([BLOCK_T], dtype=tl.float32)
    b_kk = tl.zeros([BLOCK_T], dtype=tl.float32)
    b_qk = tl.zeros([BLOCK_T], dtype=tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_q, b_k = _load_pair(qk, o_t, o_d, m_pair[:, None] & (o_d < D)[None, :], D)
        b_qq += tl.sum(b_q * b_q, axis=1)
        b_kk += tl.sum(b_k * b_k, axis=1)
        b_qk += tl.sum(b_q * b_k, axis=1)
    b_cosine = _cosine(b_qk, _reciprocal_root(b_qq), _reciprocal_root(b_kk))
    b_p = 0.5 - 0.5 * b_cosine
    b_p = tl.where(b_p < 0, 0.0, tl.where(b_p > 1, 1.0, b_p))  # a NaN stays one
    m_live = o_t < tl.load(cu + B).to(tl.int64)
    tl.store(p + o_t, tl.where(m_pair, b_p, tl.where(m_live, 1.0, 0.0)), mask=m_t)


@triton.jit
def _store_gradients(grad, o_t, o_d, m_pair, T, b_q, b_k, b_g, b_cosine, b_q_scale, b_k_scale, D):
    # With unit vectors u and v: d cos / dq = (v - cos u) / |q|, and the same for k.
    b_u = b_q * b_q_scale[:, None]
    b_v = b_k * b_k_scale[:, None]
    b_grad_q = (b_g * b_q_scale)[:, None] * (b_v - b_cosine[:, None] * b_u)
    b_grad_k = (b_g * b_k_scale)[:, None] * (b_u - b_cosine[:, None] * b_v)
    p_grad_q = grad + o_t[:, None] * (2 * D) + o_d[None, :]
    m_d = (o_d < D)[None, :]
    m_pair = m_pair[:, None]
    # Query 0, the last key, and pairs over a seam have no gradient.
    b_grad_q = tl.where(m_pair, b_grad_q, 0.0).to(grad.dtype.element_ty)
    b_grad_k = tl.where(m_pair, b_grad_k, 0.0).to(grad.dtype.element_ty)
    tl.store(p_grad_q, b_grad_q, mask=(o_t < T)[:, None] & m_d)
    tl.store(p_grad_q - D, b_grad_k, mask=((o_t > 0) & (o_t <= T))[:, None] & m_d)


@triton.jit(do_not_specialize=["T", "B", "steps"])
def boundary_bwd_kernel(
    grad_p,
    qk,
    cu,
    grad,
    T,
    B,
    steps,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row t is the pair of query t and key t - 1, for t in 0 .. T: pair T has a key only."""
    i_t = tl.program_id(0).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_pair = (o_t < T) & _has_predecessor(cu, o_t, B, steps)
    b_g = -0.5 * tl.load(grad_p + o_t, mask=m_pair, other=0)
    o_d = tl.arange(0, BLOCK_D)
    if D <= BLOCK_D:
        b_q, b_k = _load_pair(qk, o_t, o_d, m_pair[:, None] & (o_d < D)[None, :], D)
        b_q_scale = _reciprocal_root(tl.sum(b_q * b_q, axis=1))
        b_k_scale = _reciprocal_root(tl.sum(b_k * b_k, axis=1))
        b_cosine = _cosine(tl.sum(b_q * b_k, axis=1), b_q_scale, b_k_scale)
        _store_gradients(
            grad, o_t, o_d, m_pair, T, b_q, b_k, b_g, b_cosine, b_q_scale, b_k_scale, D
        )
    else:
        b_qq = tl.zeros([BLOCK_T], dtype=tl.float32)
        b_kk = tl.zeros([BLOCK_T], dtype=tl.float32)
        b_qk = tl.zeros([BLOCK_T], dtype=tl.float32)
        for i_d in range(0, D, BLOCK_D):
            m_tile = m_pair[:, None] & (i_d + o_d < D)[None, :]
            b_q, b_k = _load_pair(qk, o_t, i_d + o_d, m_tile, D)
            b_qq += tl.sum(b_q * b_q, axis=1)
            b_kk += tl.sum(b_k * b_k, axis=1)
            b_qk += tl.sum(b_q * b_k, axis=1)
        b_q_scale, b_k_scale = _reciprocal_root(b_qq), _reciprocal_root(b_kk)
        b_cosine = _cosine(b_qk, b_q_scale, b_k_scale)
        for i_d in range(0, D, BLOCK_D):
            m_tile = m_pair[:, None] & (i_d + o_d < D)[None, :]
            b_q, b_k = _load_pair(qk, o_t, i_d + o_d, m_tile, D)
            _store_gradients(
                grad, o_t, i_d + o_d, m_pair, T, b_q, b_k, b_g, b_cosine, b_q_scale, b_k_scale, D
            )


def _blocks(dim: int) -> tuple[dict[str, int], int]:
    """A row to a warp, and a row in registers up to 4096 channels; and warps."""
    block_d = min(power_of_2(dim), 4096)
    block_t = max(1, min(64, 4096 // block_d))
    return {"D": dim, "BLOCK_T": block_t, "BLOCK_D": block_d}, 4 if block_d <= 2048 else 8


def boundary_fwd(queries_keys: Tensor, cu_seqlens: Tensor) -> Tensor:
    """p, float32 (total,), of queries and keys (total, 2 * dim)."""
    queries_keys, cu_seqlens = queries_keys.contiguous(), cu_seqlens.contiguous()
    total, width = queries_keys.shape
    batch = cu_seqlens.shape[0] - 1
    p = queries_keys.new_empty(total, dtype=torch.float32)
    constants, warps = _blocks(width // 2)
    launch(
        boundary_fwd_kernel,
        cdiv(total, constants["BLOCK_T"]),
        {
            "qk": queries_keys,
            "cu": cu_seqlens,
            "p": p,
            "T": total,
            "B": batch,
            "steps": halvings(batch),
        },
        constants,
        warps,
    )
    return p


def boundary_bwd(grad_p: Tensor, queries_keys: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The gradient of queries and keys, in their shape and dtype."""
    queries_keys, cu_seqlens = queries_keys.contiguous(), cu_seqlens.contiguous()
    total, width = queries_keys.shape
    batch = cu_seqlens.shape[0] - 1
    grad = torch.empty_like(queries_keys)
    constants, warps = _blocks(width // 2)
    launch(
        boundary_bwd_kernel,
        cdiv(total + 1, constants["BLOCK_T"]),
        {
            "grad_p": grad_p.contiguous(),
            "qk": queries_keys,
            "cu": cu_seqlens,
            "grad": grad,
            "T": total,
            "B": batch,
            "steps": halvings(batch),
        },
        constants,
        warps,
    )
    return grad
