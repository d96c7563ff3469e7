"""Rotary positions: one small kernel for the angles of each row, one that moves and turns.

The second runs both ways: from one tensor to three, and with negative angles from three to one.
The angles have a kernel of their own because in the other every thread would work out all of them.
"""

import math

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

_ANGLE_ROWS = 32
_WARPS = 4


@triton.jit(do_not_specialize=["T", "B", "length", "halvings"])
def angles_kernel(
    cu,
    first,
    cos_sin,
    T,
    B,
    length,
    halvings,
    PACKED: tl.constexpr,
    FIRST: tl.constexpr,
    HALF: tl.constexpr,
    LOG2_BASE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if PACKED:
        b_sequence = sequence_of(cu, o_t, B, halvings)
        b_position = o_t - tl.load(cu + b_sequence).to(tl.int64)
    else:
        b_position = o_t % length
        if FIRST:
            b_position += tl.load(first + o_t // length, mask=o_t < T, other=0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    # In float64, because a position multiplies the error of its frequency.
    b_exponent = o_c.to(tl.float64) * (-LOG2_BASE / HALF)
    b_frequency = tl.exp2(b_exponent).to(tl.float32)
    b_angle = b_position.to(tl.float32)[:, None] * b_frequency[None, :]
    p_row = cos_sin + o_t[:, None] * (2 * HALF) + o_c[None, :]
    m_row = (o_t < T)[:, None] & (o_c < HALF)[None, :]
    tl.store(p_row, tl.cos(b_angle), mask=m_row)
    tl.store(p_row + HALF, tl.sin(b_angle), mask=m_row)


@triton.jit
def _turn_heads(x, out, b_cos, b_sin, live, HEADS, HEAD_DIM, HALF, BLOCK_H, BLOCK_C):
    """The turned channels of all heads of a row; b_cos, b_sin have one number a channel pair."""
    o_h, o_c = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    o_x = o_h[:, None] * HEAD_DIM + o_c[None, :]
    m_x = (o_h < HEADS)[:, None] & (o_c < HALF)[None, :]
    b_first = tl.load(x + o_x, mask=m_x & live, other=0).to(tl.float32)
    b_second = tl.load(x + o_x + HALF, mask=m_x & live, other=0).to(tl.float32)
    dtype = out.dtype.element_ty
    b_out = b_first * b_cos[None, :] - b_second * b_sin[None, :]
    tl.store(out + o_x, b_out.to(dtype), mask=m_x)
    b_out = b_first * b_sin[None, :] + b_second * b_cos[None, :]
    tl.store(out + o_x + HALF, b_out.to(dtype), mask=m_x)


@triton.jit
def _move_heads(x, out, live, HEADS, HEAD_DIM, FIRST, BLOCK_H, BLOCK_C):
    """The channels from FIRST on of all heads of a row."""
    o_h, o_c = tl.arange(0, BLOCK_H), FIRST + tl.arange(0, BLOCK_C)
    o_x = o_h[:, None] * HEAD_DIM + o_c[None, :]
    m_x = (o_h < HEADS)[:, None] & (o_c < HEAD_DIM)[None, :]
    tl.store(out + o_x, tl.load(x + o_x, mask=m_x & live, other=0), mask=m_x)


@triton.jit(do_not_specialize=["B", "length"])
def rotary_kernel(
    q,
    k,
    v,
    q_out,
    k_out,
    v_out,
    cos_sin,
    cu,
    lens,
    B,
    length,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    SIGN: tl.constexpr,
    ROW_IN: tl.constexpr,
    ROW_OUT: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_TURNED: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row of all three."""
    i_t = tl.program_id(0).to(tl.int64)
    # A block of one: the interpreter does not combine the mask of a block and a scalar.
    live = tl.full([1], True, tl.int1)
    if PACKED:
        live = tl.zeros([1], tl.int64) + i_t < tl.load(cu + B).to(tl.int64)
    if RAGGED:
        live = tl.zeros([1], tl.int64) + i_t % length < tl.load(lens + i_t // length).to(tl.int64)
    i_in, i_out = i_t * ROW_IN, i_t * ROW_OUT
    o_v = tl.arange(0, BLOCK_V)
    m_v = o_v < HEADS * HEAD_DIM
    b_v = tl.load(v + i_in + o_v, mask=m_v & live, other=0)
    if HALF > 0:
        o_c = tl.arange(0, BLOCK_TURNED)
        p_row = cos_sin + i_t * (2 * HALF) + o_c
        b_cos = tl.load(p_row, mask=o_c < HALF, other=0)
        b_sin = tl.load(p_row + HALF, mask=o_c < HALF, other=0) * SIGN
        _turn_heads(
            q + i_in, q_out + i_out, b_cos, b_sin, live[:, None],
            HEADS, HEAD_DIM, HALF, BLOCK_H, BLOCK_TURNED,
        )  # fmt: skip
        _turn_heads(
            k + i_in, k_out + i_out, b_cos, b_sin, live[:, None],
            HEADS, HEAD_DIM, HALF, BLOCK_H, BLOCK_TURNED,
        )  # fmt: skip
    if 2 * HALF < HEAD_DIM:
        _move_heads(
            q + i_in, q_out + i_out, live[:, None], HEADS, HEAD_DIM, 2 * HALF, BLOCK_H, BLOCK_REST
        )
        _move_heads(
            k + i_in, k_out + i_out, live[:, None], HEADS, HEAD_DIM, 2 * HALF, BLOCK_H, BLOCK_REST
        )
    tl.store(v_out + i_out + o_v, b_v, mask=m_v)


def _cos_sin(
    rows: int,
    length: int,
    half: int,
    base: float,
    cu_seqlens: Tensor | None,
    first: Tensor | None,
    cos_sin: Tensor,
) -> None:
    batch = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    launch(
        angles_kernel,
        cdiv(rows, _ANGLE_ROWS),
        {
            "cu": cos_sin if cu_seqlens is None else cu_seqlens,
            "first": cos_sin if first is None else first.contiguous(),
            "cos_sin": cos_sin,
            "T": rows,
            "B": batch,
            "length": length,
            "halvings": halvings(batch),
        },
        {
            "PACKED": cu_seqlens is not None,
            "FIRST": first is not None,
            "HALF": half,
            "LOG2_BASE": math.log2(base),
            "BLOCK": power_of_2(half),
            "ROWS": _ANGLE_ROWS,
        },
        num_warps=4,
    )


def _move(
    sources: tuple[Tensor, Tensor, Tensor],
    targets: tuple[Tensor, Tensor, Tensor],
    cos_sin: Tensor,
    cu_seqlens: Tensor | None,
    sign: float,
    lens: Tensor | None = None,
) -> None:
    """From (rows, heads, head_dim) to the same; only the strides of the rows may be any."""
    (rows, heads, head_dim), half = sources[0].shape, cos_sin.shape[-1]
    launch(
        rotary_kernel,
        rows,
        {
            **dict(zip(("q", "k", "v"), sources, strict=True)),
            **dict(zip(("q_out", "k_out", "v_out"), targets, strict=True)),
            "cos_sin": cos_sin,
            "cu": cos_sin if cu_seqlens is None else cu_seqlens,
            "lens": cos_sin if lens is None else lens.contiguous(),
            "B": 0 if cu_seqlens is None else len(cu_seqlens) - 1,
            "length": rows if lens is None else rows // len(lens),
        },
        {
            "PACKED": cu_seqlens is not None,
            "RAGGED": lens is not None,
            "SIGN": sign,
            "ROW_IN": sources[0].stride(0),
            "ROW_OUT": targets[0].stride(0),
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "HALF": half,
            "BLOCK_H": power_of_2(heads),
            "BLOCK_TURNED": power_of_2(max(1, half)),
            "BLOCK_REST": power_of_2(max(1, head_dim - 2 * half)),
            "BLOCK_V": power_of_2(heads * head_dim),
        },
        num_warps=_WARPS,
    )


def rotary_fwd(
    qkv: Tensor,
    heads: int,
    rotary_dim: int,
    base: float,
    cu_seqlens: Tensor | None,
    first: Tensor | None = None,
    lens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (..., heads, head_dim), and cosines and sines (..., 2, rotary_dim / 2).

    first:  int (batch,), with qkv (batch, length, ...): at which position a row starts; None: at 0
    lens:   int (batch,), likewise: how many of its positions are no pads; None: all
    """
    leading, width = qkv.shape[:-1], qkv.shape[-1] // 3
    rows, half = qkv.numel() // (3 * width), rotary_dim // 2
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    cos_sin = torch.empty((*leading, 2, half), dtype=torch.float32, device=qkv.device)
    if half:
        _cos_sin(rows, qkv.shape[-2], half, base, cu_seqlens, first, cos_sin)
    parts = qkv.contiguous().view(rows, 3, heads, width // heads).unbind(1)
    shape = (*leading, heads, width // heads)
    out = tuple(torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for _ in range(3))
    flat = tuple(part.view(rows, heads, -1) for part in out)
    _move(parts, flat, cos_sin, cu_seqlens, 1.0, lens)  # type: ignore[arg-type]  # three of them
    return (*out, cos_sin)  # type: ignore[return-value]


def rotary_bwd(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos_sin: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """The gradient of qkv, (..., 3 * heads * head_dim)."""
    heads, head_dim = grad_q.shape[-2:]
    rows = grad_q.numel() // (heads * head_dim)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    grad = grad_q.new_empty(*grad_q.shape[:-2], 3 * heads * head_dim)
    parts = grad.view(rows, 3, heads, head_dim).unbind(1)
    sources = tuple(g.contiguous().view(rows, heads, head_dim) for g in (grad_q, grad_k, grad_v))
    _move(sources, parts, cos_sin, cu_seqlens, -1.0)  # type: ignore[arg-type]
    return grad
