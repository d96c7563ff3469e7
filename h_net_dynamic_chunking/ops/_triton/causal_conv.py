"""Causal convolution of a few taps, bias and SiLU over packed rows: a walk down the time.

A program keeps the last rows of its channels in registers, so that each input is read once and each
pre-activation computed once. As tiles of shifted loads the backward pass would take four sigmoids a
number. Masks of positions are blocks of one, because Triton's interpreter cannot combine blocks and
scalars.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from h_net_dynamic_chunking.ops._triton.common import launch

# Rows that can be kept: a convolution of more taps goes to torch.
MAX_TAPS = 4
# Channels of a program, positions that it walks, positions that are read ahead, warps.
_FORWARD = (256, 64, 4, 1)
_BACKWARD = (128, 64, 2, 1)


@triton.jit
def _tap(weight, o_c, m_c, K: tl.constexpr, BACK: tl.constexpr):
    """The tap of what stands BACK positions before; zero if there is no such tap."""
    if BACK < K:
        b_tap = tl.load(weight + o_c * K + (K - 1 - BACK), mask=m_c, other=0).to(tl.float32)
    else:
        b_tap = tl.zeros(o_c.shape, dtype=tl.float32)
    return b_tap


@triton.jit
def _sequence(sequence, i_t, T):
    """Sequence of position t, and -1 outside of the buffer."""
    return tl.load(sequence + i_t, mask=(i_t >= 0) & (i_t < T), other=-1)


@triton.jit
def _rows_ahead(p_row, m_c, left, STRIDE: tl.constexpr, AHEAD: tl.constexpr):
    """A tuple of AHEAD rows, of which `left` are there; on their way together."""
    rows = ()
    for u in tl.static_range(AHEAD):
        m_row = m_c & (tl.arange(0, 1) + u < left)
        b_row = tl.load(p_row + u * STRIDE, mask=m_row, other=0)
        rows = rows + (b_row,)  # type: ignore[assignment]  # noqa: RUF005  (no other way in Triton)
    return rows


@triton.jit
def _sequences_ahead(sequence, i_t, T, AHEAD: tl.constexpr):
    sequences = ()
    for u in tl.static_range(AHEAD):
        i_s = _sequence(sequence, i_t + u, T)
        sequences = sequences + (i_s,)  # type: ignore[assignment]  # noqa: RUF005
    return sequences


@triton.jit
def _earlier(x, sequence, i_t, o_c, m_c, T, B, X_ROW: tl.constexpr, BACK: tl.constexpr):
    """Row t - BACK if it is in the sequence of row t - 1, else zeros."""
    i_last = _sequence(sequence, i_t - 1, T)
    is_same = (_sequence(sequence, i_t - BACK, T) == i_last) & (i_last < B)
    m_row = m_c & (i_t - BACK + tl.arange(0, 1) >= 0)
    b_x = tl.load(x + (i_t - BACK) * X_ROW + o_c, mask=m_row, other=0).to(tl.float32)
    return tl.where(is_same, b_x, 0.0)


@triton.jit(do_not_specialize=["T", "B"])
def conv_fwd_kernel(
    x,
    weight,
    bias,
    sequence,
    out,
    T,
    B,
    X_ROW: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    o_c = (i_p % tl.cdiv(C, BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_t = (i_p // tl.cdiv(C, BLOCK_C)) * ROWS
    m_c = o_c < C
    b_w0 = _tap(weight, o_c, m_c, K, 0)
    b_w1 = _tap(weight, o_c, m_c, K, 1)
    b_w2 = _tap(weight, o_c, m_c, K, 2)
    b_w3 = _tap(weight, o_c, m_c, K, 3)
    b_bias = tl.load(bias + o_c, mask=m_c, other=0).to(tl.float32)
    b_x1 = _earlier(x, sequence, i_t, o_c, m_c, T, B, X_ROW, 1)
    b_x2 = _earlier(x, sequence, i_t, o_c, m_c, T, B, X_ROW, 2)
    b_x3 = _earlier(x, sequence, i_t, o_c, m_c, T, B, X_ROW, 3)
    i_before = _sequence(sequence, i_t - 1, T)
    o_one = tl.arange(0, 1)
    for _ in range(0, ROWS, AHEAD):
        rows = _rows_ahead(x + i_t * X_ROW + o_c, m_c, T - i_t, X_ROW, AHEAD)
        sequences = _sequences_ahead(sequence, i_t, T, AHEAD)
        for u in tl.static_range(AHEAD):
            is_live = (sequences[u] >= 0) & (sequences[u] < B)
            goes_on = sequences[u] == i_before
            b_x0 = tl.where(is_live, rows[u].to(tl.float32), 0.0)
            b_x1 = tl.where(goes_on, b_x1, 0.0)
            b_x2 = tl.where(goes_on, b_x2, 0.0)
            b_x3 = tl.where(goes_on, b_x3, 0.0)
            b_sum = b_bias + b_w0 * b_x0 + b_w1 * b_x1 + b_w2 * b_x2 + b_w3 * b_x3
            b_out = tl.where(is_live, b_sum * tl.sigmoid(b_sum), 0.0)
            p_out = out + (i_t + u) * C + o_c
            tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_c & (i_t + u + o_one < T))
            b_x3 = b_x2
            b_x2 = b_x1
            b_x1 = b_x0
            i_before = sequences[u]
        i_t += AHEAD


@triton.jit
def _grad_sum(b_grad, b_sum):
    """The gradient before the SiLU."""
    b_sigmoid = tl.sigmoid(b_sum)
    return b_grad * b_sigmoid * (1 + b_sum * (1 - b_sigmoid))


@triton.jit(do_not_specialize=["T", "B"])
def conv_bwd_kernel(
    grad,
    x,
    weight,
    bias,
    sequence,
    grad_x,
    partial,
    T,
    B,
    X_ROW: tl.constexpr,
    GRAD_X_ROW: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Row t is known when the walk is at t + 3. `partial`: taps and bias of each block of rows."""
    i_p = tl.program_id(0).to(tl.int64)
    i_block = i_p // tl.cdiv(C, BLOCK_C)
    o_c = (i_p % tl.cdiv(C, BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_first = i_block * ROWS
    i_t = i_first
    m_c = o_c < C
    b_w0 = _tap(weight, o_c, m_c, K, 0)
    b_w1 = _tap(weight, o_c, m_c, K, 1)
    b_w2 = _tap(weight, o_c, m_c, K, 2)
    b_w3 = _tap(weight, o_c, m_c, K, 3)
    b_bias = tl.load(bias + o_c, mask=m_c, other=0).to(tl.float32)
    b_x1 = _earlier(x, sequence, i_t, o_c, m_c, T, B, X_ROW, 1)
    b_x2 = _earlier(x, sequence, i_t, o_c, m_c, T, B, X_ROW, 2)
    b_x3 = _earlier(x, sequence, i_t, o_c, m_c, T, B, X_ROW, 3)
    i_1 = _sequence(sequence, i_t - 1, T)
    i_2 = _sequence(sequence, i_t - 2, T)
    i_3 = _sequence(sequence, i_t - 3, T)
    b_g0 = tl.zeros([BLOCK_C], dtype=tl.float32)  # of the taps
    b_g1 = tl.zeros([BLOCK_C], dtype=tl.float32)
    b_g2 = tl.zeros([BLOCK_C], dtype=tl.float32)
    b_g3 = tl.zeros([BLOCK_C], dtype=tl.float32)
    b_gb = tl.zeros([BLOCK_C], dtype=tl.float32)
    b_d1 = tl.zeros([BLOCK_C], dtype=tl.float32)  # what rows t - 1, t - 2, t - 3 have got so far
    b_d2 = tl.zeros([BLOCK_C], dtype=tl.float32)
    b_d3 = tl.zeros([BLOCK_C], dtype=tl.float32)
    o_one = tl.arange(0, 1)
    for _ in range(0, ROWS + 3, AHEAD):
        rows = _rows_ahead(x + i_t * X_ROW + o_c, m_c, T - i_t, X_ROW, AHEAD)
        grads = _rows_ahead(grad + i_t * C + o_c, m_c, T - i_t, C, AHEAD)
        sequences = _sequences_ahead(sequence, i_t, T, AHEAD)
        for u in tl.static_range(AHEAD):
            i_0 = sequences[u]
            is_live = (i_0 >= 0) & (i_0 < B)
            b_x0 = tl.where(is_live, rows[u].to(tl.float32), 0.0)
            b_x1 = tl.where(i_0 == i_1, b_x1, 0.0)
            b_x2 = tl.where(i_0 == i_1, b_x2, 0.0)
            b_x3 = tl.where(i_0 == i_1, b_x3, 0.0)
            b_sum = b_bias + b_w0 * b_x0 + b_w1 * b_x1 + b_w2 * b_x2 + b_w3 * b_x3
            b_grad = _grad_sum(grads[u].to(tl.float32), b_sum)
            b_grad = tl.where(is_live, b_grad, 0.0)
            b_d1 += b_w1 * tl.where(i_0 == i_1, b_grad, 0.0)
            b_d2 += b_w2 * tl.where(i_0 == i_2, b_grad, 0.0)
            b_d3 += b_w3 * tl.where(i_0 == i_3, b_grad, 0.0)
            i_out = i_t + u - 3 + o_one
            m_own = (i_out >= i_first) & (i_out < i_first + ROWS) & (i_out < T)
            p_grad_x = grad_x + i_out * GRAD_X_ROW + o_c
            tl.store(p_grad_x, b_d3.to(grad_x.dtype.element_ty), mask=m_c & m_own)
            # The rows behind are the next program's, which counts them for the taps.
            b_own = tl.where(i_t + u < i_first + ROWS, b_grad, 0.0)
            b_g0 += b_own * b_x0
            b_g1 += b_own * b_x1
            b_g2 += b_own * b_x2
            b_g3 += b_own * b_x3
            b_gb += b_own
            b_d3 = b_d2
            b_d2 = b_d1
            b_d1 = b_w0 * b_grad
            b_x3 = b_x2
            b_x2 = b_x1
            b_x1 = b_x0
            i_3 = i_2
            i_2 = i_1
            i_1 = i_0
        i_t += AHEAD
    p_partial = partial + i_block * (K + 1) * C + o_c
    tl.store(p_partial + (K - 1) * C, b_g0, mask=m_c)
    if K > 1:
        tl.store(p_partial + (K - 2) * C, b_g1, mask=m_c)
    if K > 2:
        tl.store(p_partial + (K - 3) * C, b_g2, mask=m_c)
    if K > 3:
        tl.store(p_partial + (K - 4) * C, b_g3, mask=m_c)
    tl.store(p_partial + K * C, b_gb, mask=m_c)


def conv_fwd(x: Tensor, weight: Tensor, bias: Tensor, sequence: Tensor, batch: int) -> Tensor:
    """The convolution of x (total, channels), whose rows may be a slice of wider ones.

    sequence:  int32 (total,): which sequence each position is in, `batch` in the tail
    """
    total, channels = x.shape
    block_c, rows, ahead, warps = _FORWARD
    out = x.new_empty(total, channels)
    launch(
        conv_fwd_kernel,
        triton.cdiv(total, rows) * triton.cdiv(channels, block_c),
        {
            "x": x,
            "weight": weight.contiguous(),
            "bias": bias.contiguous(),
            "sequence": sequence,
            "out": out,
            "T": total,
            "B": batch,
        },
        {
            "X_ROW": x.stride(0),
            "C": channels,
            "K": weight.shape[-1],
            "BLOCK_C": block_c,
            "ROWS": rows,
            "AHEAD": ahead,
        },
        num_warps=warps,
    )
    return out


def conv_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    sequence: Tensor,
    batch: int,
    grad_x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of x to `grad_x`, which may be a slice; return those of the parameters."""
    total, channels = x.shape
    taps = weight.shape[-1]
    block_c, rows, ahead, warps = _BACKWARD
    blocks = triton.cdiv(total, rows)
    partial = torch.empty(blocks, taps + 1, channels, dtype=torch.float32, device=x.device)
    launch(
        conv_bwd_kernel,
        blocks * triton.cdiv(channels, block_c),
        {
            "grad": grad,
            "x": x,
            "weight": weight.contiguous(),
            "bias": bias.contiguous(),
            "sequence": sequence,
            "grad_x": grad_x,
            "partial": partial,
            "T": total,
            "B": batch,
        },
        {
            "X_ROW": x.stride(0),
            "GRAD_X_ROW": grad_x.stride(0),
            "C": channels,
            "K": taps,
            "BLOCK_C": block_c,
            "ROWS": rows,
            "AHEAD": ahead,
        },
        num_warps=warps,
    )
    summed = partial.sum(0)
    grad_weight = summed[:taps].mT.reshape(weight.shape)
    return grad_weight.to(weight.dtype), summed[taps].to(bias.dtype)
