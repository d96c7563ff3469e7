"""Residual addition with RMSNorm: a program keeps whole rows in registers.

Forward it has one tile of rows. Backward it walks over several, with its part of the weight's
gradient in registers; the parts are added up by `partial_sums`, always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch, power_of_2
from h_net_dynamic_chunking.ops._triton.partial_sums import column_sums

# Rows of a tile, and numbers of a row that a thread holds.
_FORWARD = (1, 8)
_BACKWARD = (1, 8)
# Warps of the backward pass, at most: 32 for each processor of an H200. Of 65536 x 1024 and 13120 x
# 1536 numbers both are fastest so, at 90 and 75% of its bandwidth (bfloat16, Triton 3.6).
_WARPS = 4224


@triton.jit(do_not_specialize=["T", "B"])
def add_rms_norm_fwd_kernel(
    h,
    update,
    weight,
    cu,
    s,
    out,
    T,
    B,
    eps,
    HAS_UPDATE: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_row = (o_t < T)[:, None] & (o_d < D)[None, :]
    m_live = m_row
    if PACKED:
        m_live &= (o_t < tl.load(cu + B).to(tl.int64))[:, None]
    o_x = o_t[:, None] * D + o_d[None, :]
    b_s = tl.load(h + o_x, mask=m_live, other=0).to(tl.float32)
    if HAS_UPDATE:
        b_s += tl.load(update + o_x, mask=m_live, other=0).to(tl.float32)
    b_weight = tl.load(weight + o_d, mask=o_d < D, other=0).to(tl.float32)
    tl.store(s + o_x, b_s, mask=m_row)
    scale = 1 / tl.sqrt(tl.sum(b_s * b_s, axis=1) / D + eps)
    b_out = b_s * scale[:, None] * b_weight[None, :]
    tl.store(out + o_x, b_out.to(out.dtype.element_ty), mask=m_row)


@triton.jit(do_not_specialize=["T", "B", "steps"])
def add_rms_norm_bwd_kernel(
    grad_s,
    grad_out,
    s,
    weight,
    cu,
    grad,
    again,
    partial,
    T,
    B,
    steps,
    eps,
    HAS_GRAD_S: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    PACKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """With n = s scale and u = grad_out weight: grad = grad_s + scale (u - n mean(u n))."""
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_weight = tl.load(weight + o_d, mask=m_d, other=0).to(tl.float32)
    b_grad_weight = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i in range(steps):
        o_t = (i_b * steps + i) * ROWS + tl.arange(0, ROWS)
        m_row = (o_t < T)[:, None] & m_d[None, :]
        m_live = m_row
        if PACKED:
            m_live &= (o_t < tl.load(cu + B).to(tl.int64))[:, None]
        o_x = o_t[:, None] * D + o_d[None, :]
        b_s = tl.load(s + o_x, mask=m_live, other=0)
        b_grad = tl.load(grad_out + o_x, mask=m_live, other=0).to(tl.float32)
        b_u = b_grad * b_weight[None, :]
        scale = 1 / tl.sqrt(tl.sum(b_s * b_s, axis=1) / D + eps)
        along = tl.sum(b_u * b_s, axis=1) * scale / D
        b_normed = b_s * scale[:, None]
        b_grad_weight += tl.sum(b_grad * b_normed, axis=0)
        b_total = (b_u - b_normed * along[:, None]) * scale[:, None]
        if HAS_GRAD_S:
            b_total += tl.load(grad_s + o_x, mask=m_live, other=0).to(tl.float32)
        tl.store(grad + o_x, b_total.to(grad.dtype.element_ty), mask=m_row)
        if HAS_SECOND:
            tl.store(again + o_x, b_total.to(again.dtype.element_ty), mask=m_row)
    tl.store(partial + i_b * D + o_d, b_grad_weight, mask=m_d)


def _warps(elements: int, numbers: int) -> int:
    return max(1, min(16, elements // (32 * numbers)))


def add_rms_norm_fwd(
    h: Tensor, update: Tensor | None, weight: Tensor, eps: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum in float32, and its norm in the dtype of the weight."""
    dim = h.shape[-1]
    total, block, (rows, numbers) = h.numel() // dim, power_of_2(dim), _FORWARD
    h, weight = h.contiguous(), weight.contiguous()
    s = torch.empty(h.shape, dtype=torch.float32, device=h.device)
    out = torch.empty(h.shape, dtype=weight.dtype, device=h.device)
    launch(
        add_rms_norm_fwd_kernel,
        cdiv(total, rows),
        {
            "h": h,
            "update": h if update is None else update.contiguous(),
            "weight": weight,
            "cu": h if cu_seqlens is None else cu_seqlens.contiguous(),
            "s": s,
            "out": out,
            "T": total,
            "B": 0 if cu_seqlens is None else len(cu_seqlens) - 1,
            "eps": eps,
        },
        {
            "HAS_UPDATE": update is not None,
            "PACKED": cu_seqlens is not None,
            "D": dim,
            "BLOCK_D": block,
            "ROWS": rows,
        },
        num_warps=_warps(rows * block, numbers),
    )
    return s, out


def add_rms_norm_bwd(
    grad_s: Tensor | None,
    grad_out: Tensor,
    s: Tensor,
    weight: Tensor,
    eps: float,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    second: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the sum in one dtype, in a second, and that of the weight."""
    dim = s.shape[-1]
    total, block, (rows, numbers) = s.numel() // dim, power_of_2(dim), _BACKWARD
    tiles, warps = cdiv(total, rows), _warps(rows * block, numbers)
    steps = cdiv(tiles, _WARPS // warps)
    programs = cdiv(tiles, steps)
    grad = torch.empty(s.shape, dtype=dtype, device=s.device)
    again = s.new_empty(0) if second is None else torch.empty_like(s, dtype=second)
    partial = torch.empty(programs, dim, dtype=torch.float32, device=s.device)
    launch(
        add_rms_norm_bwd_kernel,
        programs,
        {
            "grad_s": s if grad_s is None else grad_s.contiguous(),
            "grad_out": grad_out.contiguous(),
            "s": s,
            "weight": weight.contiguous(),
            "cu": s if cu_seqlens is None else cu_seqlens.contiguous(),
            "grad": grad,
            "again": again if second is not None else grad,
            "partial": partial,
            "T": total,
            "B": 0 if cu_seqlens is None else len(cu_seqlens) - 1,
            "steps": steps,
            "eps": eps,
        },
        {
            "HAS_GRAD_S": grad_s is not None,
            "HAS_SECOND": second is not None,
            "PACKED": cu_seqlens is not None,
            "D": dim,
            "BLOCK_D": block,
            "ROWS": rows,
        },
        num_warps=warps,
    )
    return grad, again, column_sums(partial, weight.dtype)
