"""RMSNorm of y silu(z): a program keeps a whole row in registers, and walks a few.

Masks of positions are blocks of one: Triton's interpreter cannot combine blocks and scalars.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch, power_of_2, sigmoid, silu

# Widest row that is kept in registers.
MAX_DIM = 8192
# Rows of a program, numbers of a thread.
_FORWARD = (1, 16)
_BACKWARD = (16, 16, True)


@triton.jit(do_not_specialize=["T", "B"])
def gated_norm_fwd_kernel(
    y,
    z,
    weight,
    cu,
    out,
    T,
    B,
    eps,
    PACKED: tl.constexpr,
    Z_ROW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64) * ROWS
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    end = tl.zeros([1], tl.int64) + T
    if PACKED:
        end = tl.load(cu + B).to(tl.int64)
    b_weight = tl.load(weight + o_d, mask=m_d, other=0).to(tl.float32)
    for _ in range(ROWS):
        o_t = i_t + tl.arange(0, 1)
        m_live = m_d & (o_t < end) & (o_t < T)
        b_y = tl.load(y + i_t * D + o_d, mask=m_live, other=0).to(tl.float32)
        b_z = tl.load(z + i_t * Z_ROW + o_d, mask=m_live, other=0).to(tl.float32)
        b_gated = b_y * silu(b_z)
        scale = 1 / tl.sqrt(tl.sum(b_gated * b_gated) / D + eps)
        b_out = b_gated * scale * b_weight
        tl.store(out + i_t * D + o_d, b_out.to(out.dtype.element_ty), mask=m_d & (o_t < T))
        i_t += 1


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def _row(grad, y, z, i_t, o_d, m_d, end, D: tl.constexpr, Z_ROW: tl.constexpr):
    m_live = m_d & (i_t + tl.arange(0, 1) < end)
    b_grad = tl.load(grad + i_t * D + o_d, mask=m_live, other=0)
    b_y = tl.load(y + i_t * D + o_d, mask=m_live, other=0)
    b_z = tl.load(z + i_t * Z_ROW + o_d, mask=m_live, other=0)
    return b_grad, b_y, b_z


@triton.jit(do_not_specialize=["T", "B"])
def gated_norm_bwd_kernel(
    grad,
    y,
    z,
    weight,
    cu,
    grad_y,
    grad_z,
    partial,
    T,
    B,
    eps,
    Z_ROW: tl.constexpr,
    GRAD_Z_ROW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """With n = y silu(z) scale and u = grad weight: the gradient of y silu(z) is
    scale (u - n mean(u n)). The scale is had again from what is in registers anyway."""
    i_block = tl.program_id(0).to(tl.int64)
    i_t = i_block * ROWS
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    end = tl.minimum(tl.load(cu + B).to(tl.int64), T)
    end = tl.minimum(end, i_t + ROWS)
    b_weight = tl.load(weight + o_d, mask=m_d, other=0).to(tl.float32)
    b_grad_weight = tl.zeros([BLOCK_D], dtype=tl.float32)
    if AHEAD:
        b_next_grad, b_next_y, b_next_z = _row(grad, y, z, i_t, o_d, m_d, end, D, Z_ROW)
    for _ in range(ROWS):
        if AHEAD:
            b_grad, b_y, b_z = b_next_grad, b_next_y, b_next_z
            b_next_grad, b_next_y, b_next_z = _row(grad, y, z, i_t + 1, o_d, m_d, end, D, Z_ROW)
        else:
            b_grad, b_y, b_z = _row(grad, y, z, i_t, o_d, m_d, end, D, Z_ROW)
        b_g, b_yf, b_zf = b_grad.to(tl.float32), b_y.to(tl.float32), b_z.to(tl.float32)
        b_sigmoid = sigmoid(b_zf)
        b_silu = b_zf * b_sigmoid
        b_gated = b_yf * b_silu
        b_u = b_g * b_weight
        square, along = tl.reduce((b_gated * b_gated, b_u * b_gated), 0, _add)
        scale = 1 / tl.sqrt(square / D + eps)
        along = scale * (along / D)
        b_normed = b_gated * scale
        b_grad_weight += b_g * b_normed
        b_grad_gated = scale * (b_u - b_normed * along)
        m_row = m_d & (i_t + tl.arange(0, 1) < T)
        b_grad_y = b_grad_gated * b_silu
        tl.store(grad_y + i_t * D + o_d, b_grad_y.to(grad_y.dtype.element_ty), mask=m_row)
        b_grad_z = b_grad_gated * b_yf * (b_sigmoid + b_silu * (1 - b_sigmoid))
        p_grad_z = grad_z + i_t * GRAD_Z_ROW + o_d
        tl.store(p_grad_z, b_grad_z.to(grad_z.dtype.element_ty), mask=m_row)
        if AGAIN:
            # Nobody else reads this row of grad.
            b_out = b_normed * b_weight
            tl.store(grad + i_t * D + o_d, b_out.to(grad.dtype.element_ty), mask=m_row)
        i_t += 1
    tl.store(partial + i_block * D + o_d, b_grad_weight, mask=m_d)


def _warps(block: int, numbers: int) -> int:
    return max(1, min(16, block // (32 * numbers)))


def gated_norm_fwd(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor | None
) -> Tensor:
    """The normed rows in the dtype of y; z may be a slice. cu_seqlens: None for no tail."""
    total, dim = y.shape
    rows, numbers = _FORWARD
    block = power_of_2(dim)
    out = torch.empty_like(y)
    launch(
        gated_norm_fwd_kernel,
        cdiv(total, rows),
        {
            "y": y,
            "z": z,
            "weight": weight.contiguous(),
            "cu": out if cu_seqlens is None else cu_seqlens.contiguous(),
            "out": out,
            "T": total,
            "B": 0 if cu_seqlens is None else len(cu_seqlens) - 1,
            "eps": eps,
        },
        {
            "PACKED": cu_seqlens is not None,
            "Z_ROW": z.stride(0),
            "D": dim,
            "BLOCK_D": block,
            "ROWS": rows,
        },
        num_warps=_warps(block, numbers),
    )
    return out


def gated_norm_bwd(
    grad: Tensor,
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    cu_seqlens: Tensor,
    grad_z: Tensor,
    again: bool = False,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of z to `grad_z`, which may be a slice; return those of y and weight.

    again: whether `grad` becomes what `gated_norm_fwd` returned, give or take its last bit
    """
    total, dim = y.shape
    rows, numbers, ahead = _BACKWARD
    block, blocks = power_of_2(dim), cdiv(total, rows)
    grad_y = torch.empty_like(y)
    partial = torch.empty(blocks, dim, dtype=torch.float32, device=y.device)
    launch(
        gated_norm_bwd_kernel,
        blocks,
        {
            "grad": grad,
            "y": y,
            "z": z,
            "weight": weight.contiguous(),
            "cu": cu_seqlens.contiguous(),
            "grad_y": grad_y,
            "grad_z": grad_z,
            "partial": partial,
            "T": total,
            "B": len(cu_seqlens) - 1,
            "eps": eps,
        },
        {
            "Z_ROW": z.stride(0),
            "GRAD_Z_ROW": grad_z.stride(0),
            "D": dim,
            "BLOCK_D": block,
            "ROWS": rows,
            "AHEAD": ahead,
            "AGAIN": again,
        },
        num_warps=_warps(block, numbers),
    )
    return grad_y, partial.sum(0).to(weight.dtype)
