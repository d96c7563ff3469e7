"""dt = softplus(raw + bias), the step of each head and position, and its backward pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import cdiv, launch, power_of_2
from h_net_dynamic_chunking.ops._triton.state_step import softplus

# Numbers of a program.
_BLOCK = 4096


@triton.jit
def _tile(T, H, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_h = tl.arange(0, BLOCK_H)
    return o_t, o_h, (o_t < T)[:, None] & (o_h < H)[None, :]


@triton.jit(do_not_specialize=["T", "B", "length"])
def time_step_fwd_kernel(
    raw,
    bias,
    cu,
    lens,
    dt,
    T,
    B,
    length,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    ROW: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    o_t, o_h, m_tile = _tile(T, H, BLOCK_T, BLOCK_H)
    m_live = m_tile
    if PACKED:
        m_live = m_live & (o_t < tl.load(cu + B).to(tl.int64))[:, None]
    if RAGGED:
        b_live = tl.load(lens + o_t // length, mask=o_t < T, other=0)
        m_live = m_live & (o_t % length < b_live)[:, None]
    b_raw = tl.load(raw + o_t[:, None] * ROW + o_h[None, :], mask=m_live, other=0).to(tl.float32)
    b_bias = tl.load(bias + o_h, mask=o_h < H, other=0).to(tl.float32)
    b_dt = tl.where(m_live, softplus(b_raw + b_bias[None, :]), 0.0)
    tl.store(dt + o_t[:, None] * H + o_h[None, :], b_dt, mask=m_tile)


@triton.jit(do_not_specialize=["T", "B"])
def time_step_bwd_kernel(
    grad,
    raw,
    bias,
    cu,
    grad_raw,
    partial,
    T,
    B,
    ROW: tl.constexpr,
    GRAD_ROW: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    o_t, o_h, m_tile = _tile(T, H, BLOCK_T, BLOCK_H)
    m_live = m_tile & (o_t < tl.load(cu + B).to(tl.int64))[:, None]
    b_raw = tl.load(raw + o_t[:, None] * ROW + o_h[None, :], mask=m_live, other=0).to(tl.float32)
    b_bias = tl.load(bias + o_h, mask=o_h < H, other=0).to(tl.float32)
    b_grad = tl.load(grad + o_t[:, None] * H + o_h[None, :], mask=m_live, other=0)
    b_grad = b_grad * tl.sigmoid(b_raw + b_bias[None, :])
    p_grad = grad_raw + o_t[:, None] * GRAD_ROW + o_h[None, :]
    tl.store(p_grad, b_grad.to(grad_raw.dtype.element_ty), mask=m_tile)
    p_partial = partial + tl.program_id(0).to(tl.int64) * H + o_h
    tl.store(p_partial, tl.sum(b_grad, axis=0), mask=o_h < H)


def _blocks(total: int, heads: int) -> tuple[int, dict[str, int]]:
    block_h = power_of_2(heads)
    block_t = max(1, _BLOCK // block_h)
    return cdiv(total, block_t), {"H": heads, "BLOCK_T": block_t, "BLOCK_H": block_h}


def time_step_fwd(
    raw: Tensor, bias: Tensor, cu_seqlens: Tensor | None, lens: Tensor | None = None
) -> Tensor:
    """Float32 (total, heads), zeros in the tail and at pads; raw (total, heads) may be a slice.

    cu_seqlens:  None for no tail
    lens:        int (rows,), positions of each of so many rows, on the left; None for no pads
    """
    total, heads = raw.shape
    dt = torch.empty(total, heads, dtype=torch.float32, device=raw.device)
    programs, blocks = _blocks(total, heads)
    launch(
        time_step_fwd_kernel,
        programs,
        {
            "raw": raw,
            "bias": bias.contiguous(),
            # What is None is not touched: dt stands in its place.
            "cu": dt if cu_seqlens is None else cu_seqlens.contiguous(),
            "lens": dt if lens is None else lens.contiguous(),
            "dt": dt,
            "T": total,
            "B": 0 if cu_seqlens is None else len(cu_seqlens) - 1,
            "length": total if lens is None else total // len(lens),
        },
        {
            "PACKED": cu_seqlens is not None,
            "RAGGED": lens is not None,
            "ROW": raw.stride(0),
            **blocks,
        },
        num_warps=4,
    )
    return dt


def time_step_bwd(
    grad: Tensor, raw: Tensor, bias: Tensor, cu_seqlens: Tensor, grad_raw: Tensor
) -> Tensor:
    """Write the gradient of raw to `grad_raw`, which may be a slice; return that of the bias."""
    total, heads = raw.shape
    programs, blocks = _blocks(total, heads)
    partial = torch.empty(programs, heads, dtype=torch.float32, device=raw.device)
    launch(
        time_step_bwd_kernel,
        programs,
        {
            "grad": grad.contiguous(),
            "raw": raw,
            "bias": bias.contiguous(),
            "cu": cu_seqlens.contiguous(),
            "grad_raw": grad_raw,
            "partial": partial,
            "T": total,
            "B": len(cu_seqlens) - 1,
        },
        {"ROW": raw.stride(0), "GRAD_ROW": grad_raw.stride(0), **blocks},
        num_warps=4,
    )
    return partial.sum(0).to(bias.dtype)
